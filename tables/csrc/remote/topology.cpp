// SPDX-License-Identifier: Apache-2.0
#include "topology.h"

#include <netdb.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstring>
#include <stdexcept>

#include "resp.h"

namespace hstu_trt::remote {
namespace {

constexpr int64_t kRefreshEveryUs = 60'000'000;
constexpr int64_t kRefreshPauseUs = 100'000;

Address resolve(std::string const& host, int port) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  Address address;
  if (getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found) != 0) return address;
  address.length = found->ai_addrlen;
  std::memcpy(&address.storage, found->ai_addr, found->ai_addrlen);
  freeaddrinfo(found);
  return address;
}

// A reply as a tree; CLUSTER SLOTS is three arrays deep.
struct Value {
  Token::Kind kind;
  std::string text;
  int64_t number = 0;
  std::vector<Value> items;
};

Value read_value(ReplyReader& reader, int depth) {
  Token token;
  if (depth > 8 || !reader.next(&token)) throw ProtocolError("CLUSTER SLOTS answered something else than a map");
  Value value{token.kind, std::string(token.text), token.number, {}};
  if (token.kind != Token::Kind::kArray) return value;
  for (int64_t item = 0; item < token.number; ++item) value.items.push_back(read_value(reader, depth + 1));
  return value;
}

Value read_reply(std::string_view reply) {
  if (reply.empty()) throw ProtocolError("CLUSTER SLOTS answered nothing");
  ReplyReader reader;
  std::memcpy(reader.space(reply.size()), reply.data(), reply.size());
  reader.filled(reply.size());
  return read_value(reader, 0);
}

bool is_range(Value const& range) {
  return range.kind == Token::Kind::kArray && range.items.size() >= 3 && range.items[0].kind == Token::Kind::kInteger &&
         range.items[1].kind == Token::Kind::kInteger && range.items[0].number >= 0 &&
         range.items[0].number <= range.items[1].number && range.items[1].number < kSlots;
}

bool is_node(Value const& node) {
  return node.kind == Token::Kind::kArray && node.items.size() >= 2 && node.items[1].kind == Token::Kind::kInteger &&
         node.items[1].number > 0 && node.items[1].number < 65536;
}

}  // namespace

int64_t now_us() {
  auto const now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::microseconds>(now).count();
}

std::pair<std::string, int> split_endpoint(std::string_view text) {
  size_t const colon = text.rfind(':');
  int port = 0;
  if (colon == text.npos || colon == 0) throw std::invalid_argument("no port in " + std::string(text));
  char const* end = text.data() + text.size();
  auto const read = std::from_chars(text.data() + colon + 1, end, port);
  if (read.ec != std::errc() || read.ptr != end || port < 1 || port > 65535)
    throw std::invalid_argument("no port in " + std::string(text));
  std::string_view host = text.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  return {std::string(host), port};
}

Node::Node(size_t index, std::string host, int port, int failures, int64_t open_us)
    : index(index), host(std::move(host)), port(port), address(resolve(this->host, port)), breaker(failures, open_us) {}

Node* Topology::node(std::string_view host, int port) {
  std::lock_guard const lock(mutex_);
  for (auto const& node : nodes_)
    if (node->port == port && node->host == host) return node.get();
  nodes_.push_back(std::make_unique<Node>(nodes_.size(), std::string(host), port, breaker_failures_, breaker_open_us_));
  return nodes_.back().get();
}

std::vector<Node*> Topology::nodes() {
  std::lock_guard const lock(mutex_);
  std::vector<Node*> nodes;
  for (auto const& node : nodes_) nodes.push_back(node.get());
  return nodes;
}

std::shared_ptr<SlotMap const> Topology::map() {
  std::lock_guard const lock(mutex_);
  return map_;
}

void Topology::replace(std::string_view reply, Node const& from) {
  Value const ranges = read_reply(reply);
  if (ranges.kind != Token::Kind::kArray || ranges.items.size() > kSlots)
    throw ProtocolError("CLUSTER SLOTS answered something else than a map");
  auto map = std::make_shared<SlotMap>();
  for (Value const& range : ranges.items) {
    if (!is_range(range)) throw ProtocolError("CLUSTER SLOTS answered a range of slots that is none");
    Owners owners;
    for (size_t item = 2; item < range.items.size(); ++item) {
      Value const& server = range.items[item];
      if (!is_node(server)) throw ProtocolError("CLUSTER SLOTS answered a node that is none");
      // A node that knows no name of its own leaves it empty: it is the one that was asked.
      std::string const& host = server.items[0].text.empty() ? from.host : server.items[0].text;
      Node* known = node(host, static_cast<int>(server.items[1].number));
      item == 2 ? void(owners.master = known) : owners.replicas.push_back(known);
    }
    map->owners.push_back(std::move(owners));
    std::fill(map->owner_of.begin() + range.items[0].number, map->owner_of.begin() + range.items[1].number + 1,
              static_cast<uint16_t>(map->owners.size() - 1));
  }
  std::lock_guard const lock(mutex_);
  // A node that has left its cluster knows of no slots; others know better.
  if (map->owners.size() == 1) return;
  map_ = std::move(map);
  doubted_ = false;
}

void Topology::move_slot(int slot, Node* master) {
  std::lock_guard const lock(mutex_);
  doubted_ = true;
  if (map_->owners[map_->owner_of[slot]].master == master) return;
  auto map = std::make_shared<SlotMap>(*map_);
  size_t owner = 1;
  while (owner < map->owners.size() && map->owners[owner].master != master) ++owner;
  if (owner == map->owners.size()) map->owners.push_back({master, {}});
  map->owner_of[slot] = static_cast<uint16_t>(owner);
  map_ = std::move(map);
}

bool Topology::claim_refresh(int64_t now) {
  std::lock_guard const lock(mutex_);
  if (now - refreshed_us_ < (doubted_ ? kRefreshPauseUs : kRefreshEveryUs)) return false;
  refreshed_us_ = now;
  return true;
}

void Topology::doubt() {
  std::lock_guard const lock(mutex_);
  doubted_ = true;
}

}  // namespace hstu_trt::remote
