// SPDX-License-Identifier: Apache-2.0
#include "rows.h"

#include <bit>
#include <cstring>

namespace hstu_trt::remote {
namespace {

constexpr uint32_t kEmpty = UINT32_MAX;
constexpr size_t kFieldBytes = sizeof(int64_t);

// The field of a row. The byte order is the machine's; this code is built for little-endian ones.
static_assert(std::endian::native == std::endian::little);

void append_field(std::string& out, int64_t row) {
  char text[4 + kFieldBytes + 2] = {'$', '8', '\r', '\n'};
  std::memcpy(text + 4, &row, kFieldBytes);
  text[4 + kFieldBytes] = '\r';
  text[5 + kFieldBytes] = '\n';
  out.append(text, sizeof text);
}

Table const& table_of(HstuTrtRemoteJob const& job) { return *reinterpret_cast<Table const*>(job.table); }

}  // namespace

Table::Table(std::string prefix, uint32_t partitions, uint32_t row_bytes) : row_bytes(row_bytes) {
  for (uint32_t partition = 0; partition < partitions; ++partition) {
    keys_.push_back(prefix + ":" + std::to_string(partition) + "}");
    slots_.push_back(key_slot(keys_.back()));
  }
}

void Grouping::find_distinct(HstuTrtRemoteJob const& job) {
  size_t const count = static_cast<size_t>(job.count);
  size_t const mask = std::bit_ceil(2 * count + 1) - 1;
  slots_.assign(mask + 1, kEmpty);
  unsorted_.clear();
  twins_.clear();
  for (uint32_t place = 0; place < count; ++place) {
    int64_t const row = job.rows[place];
    if (row < 0) continue;
    size_t slot = splitmix64(static_cast<uint64_t>(row)) >> 20 & mask;
    while (slots_[slot] != kEmpty && job.rows[slots_[slot]] != row) slot = (slot + 1) & mask;
    if (slots_[slot] == kEmpty) {
      slots_[slot] = place;
      unsorted_.push_back(place);
    } else {
      twins_.emplace_back(slots_[slot], place);
    }
  }
}

void Grouping::sort(HstuTrtRemoteJob const& job, uint32_t most) {
  Table const& table = table_of(job);
  find_distinct(job);
  starts_.assign(table.partitions() + 1, 0);
  for (uint32_t const place : unsorted_) ++starts_[table.partition_of(job.rows[place]) + 1];
  for (uint32_t partition = 0; partition < table.partitions(); ++partition)
    starts_[partition + 1] += starts_[partition];
  ranges_.clear();
  for (uint32_t partition = 0; partition < table.partitions(); ++partition)
    for (uint32_t begin = starts_[partition]; begin < starts_[partition + 1]; begin += most)
      ranges_.push_back({partition, begin, std::min(begin + most, starts_[partition + 1])});
  first_.resize(unsorted_.size());
  for (uint32_t const place : unsorted_) first_[starts_[table.partition_of(job.rows[place])]++] = place;
}

ReadRows::ReadRows(HstuTrtRemoteJob const& job, Grouping const& grouping, Grouping::Range range)
    : job_(job), table_(table_of(job)), grouping_(grouping), range_(range), next_(range.begin) {
  slot = table_.slot(range.partition);
  reads_only = true;
}

void ReadRows::encode(std::string& out) const {
  append_array(out, 2 + range_.end - range_.begin);
  append_bulk(out, "HMGET");
  append_bulk(out, table_.key(range_.partition));
  for (uint32_t i = range_.begin; i < range_.end; ++i) append_field(out, job_.rows[grouping_.first(i)]);
}

void ReadRows::take(Token const& token) {
  if (token.kind == Token::Kind::kArray) {
    if (begun_ || token.number != range_.end - range_.begin)
      throw ProtocolError("HMGET answered another number of values");
    begun_ = true;
    return;
  }
  if (!begun_) throw ProtocolError("HMGET answered something else than values");
  uint32_t const place = grouping_.first(next_++);
  uint8_t* value = job_.values + place * job_.stride;
  if (token.kind == Token::Kind::kBulk && token.text.size() == table_.row_bytes) {
    std::memcpy(value, token.text.data(), table_.row_bytes);
    job_.status[place] = HSTU_TRT_ROW_FOUND;
    return;
  }
  std::memset(value, 0, table_.row_bytes);
  job_.status[place] = token.kind == Token::Kind::kNil ? HSTU_TRT_ROW_MISSING : HSTU_TRT_ROW_REFUSED;
}

void ReadRows::refused(std::string_view error) {
  // Whatever else a node refuses (no login, no permission), it says nothing about the rows.
  fill(error.substr(0, 9) == "WRONGTYPE" ? HSTU_TRT_ROW_REFUSED : HSTU_TRT_ROW_UNAVAILABLE);
}

void ReadRows::fill(uint8_t status) {
  for (uint32_t i = range_.begin; i < range_.end; ++i) {
    uint32_t const place = grouping_.first(i);
    std::memset(job_.values + place * job_.stride, 0, table_.row_bytes);
    job_.status[place] = status;
  }
}

WriteRows::WriteRows(HstuTrtRemoteJob const& job, Grouping const& grouping, Grouping::Range range)
    : job_(job), table_(table_of(job)), grouping_(grouping), range_(range) {
  slot = table_.slot(range.partition);
}

void WriteRows::encode(std::string& out) const {
  append_array(out, 2 + 2 * (range_.end - range_.begin));
  append_bulk(out, "HSET");
  append_bulk(out, table_.key(range_.partition));
  for (uint32_t i = range_.begin; i < range_.end; ++i) {
    uint32_t const place = grouping_.first(i);
    append_field(out, job_.rows[place]);
    append_bulk(out, {reinterpret_cast<char const*>(job_.values + place * job_.stride), table_.row_bytes});
  }
}

void WriteRows::fill(uint8_t status) {
  for (uint32_t i = range_.begin; i < range_.end; ++i) job_.status[grouping_.first(i)] = status;
}

}  // namespace hstu_trt::remote
