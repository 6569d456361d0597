// SPDX-License-Identifier: Apache-2.0
#include "capi.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <exception>
#include <string>

#include "client.h"

using namespace hstu_trt::remote;

namespace {

Client& client_of(HstuTrtRemoteClient* client) { return *reinterpret_cast<Client*>(client); }

void tell(char* error, size_t room, std::string const& text) {
  if (room == 0) return;
  size_t const size = std::min(text.size(), room - 1);
  std::memcpy(error, text.data(), size);
  error[size] = '\0';
}

// Runs `body`, which returns what to tell; 0 unless it throws.
template <typename Body>
int32_t guarded(char* error, size_t room, Body body) noexcept {
  try {
    tell(error, room, body());
    return 0;
  } catch (std::exception const& exception) {
    tell(error, room, exception.what());
    return 1;
  }
}

std::vector<std::string> split(char const* text, char separator) {
  std::vector<std::string> parts;
  for (std::string_view rest = text; !rest.empty();) {
    size_t const end = std::min(rest.find(separator), rest.size());
    if (end > 0) parts.emplace_back(rest.substr(0, end));
    rest.remove_prefix(std::min(end + 1, rest.size()));
  }
  return parts;
}

std::string text_of(char const* text) { return text != nullptr ? text : ""; }

}  // namespace

int32_t hstu_trt_remote_abi(void) { return HSTU_TRT_REMOTE_ABI; }

HstuTrtRemoteClient* hstu_trt_remote_open(HstuTrtRemoteOptions const* options, int64_t deadline_us, char* error,
                                          size_t room) {
  Client* client = nullptr;
  guarded(error, room, [&] {
    Settings settings;
    settings.seeds = split(options->seeds, ',');
    settings.login = {text_of(options->user), text_of(options->password)};
    settings.breaker_failures = std::max(1, options->breaker_failures);
    settings.breaker_open_us = options->breaker_open_us;
    settings.rows_per_command = static_cast<uint32_t>(std::max(1, options->rows_per_command));
    settings.replica_reads = options->replica_reads != 0;
    std::unique_ptr<TlsContext> tls;
    if (options->tls)
      tls = std::make_unique<TlsContext>(
          TlsFiles{text_of(options->tls_authorities), text_of(options->tls_certificate), text_of(options->tls_key)});
    client = new Client(std::move(settings), std::move(tls), deadline_us);
    return std::string();
  });
  return reinterpret_cast<HstuTrtRemoteClient*>(client);
}

void hstu_trt_remote_close(HstuTrtRemoteClient* client) { delete reinterpret_cast<Client*>(client); }

HstuTrtRemoteTable* hstu_trt_remote_table(char const* prefix, uint32_t partitions, uint32_t row_bytes) {
  if (!std::has_single_bit(partitions) || row_bytes == 0 || row_bytes > kMaxBulk) return nullptr;
  Table* table = nullptr;
  guarded(nullptr, 0, [&] {
    table = new Table(prefix, partitions, row_bytes);
    return std::string();
  });
  return reinterpret_cast<HstuTrtRemoteTable*>(table);
}

void hstu_trt_remote_table_free(HstuTrtRemoteTable* table) { delete reinterpret_cast<Table*>(table); }

int32_t hstu_trt_remote_read(HstuTrtRemoteClient* client, HstuTrtRemoteJob const* jobs, int32_t count,
                             int64_t deadline_us, char* error, size_t room) {
  return guarded(error, room, [&] { return client_of(client).read(jobs, static_cast<size_t>(count), deadline_us); });
}

int32_t hstu_trt_remote_write(HstuTrtRemoteClient* client, HstuTrtRemoteJob const* job, int64_t deadline_us,
                              char* error, size_t room) {
  return guarded(error, room, [&] { return client_of(client).write(*job, deadline_us); });
}

int32_t hstu_trt_remote_execute(HstuTrtRemoteClient* client, char const* node, int32_t parts, char const* const* part,
                                size_t const* sizes, int64_t deadline_us, HstuTrtRemoteReply reply, void* context,
                                char* error, size_t room) {
  bool answered = false;
  int32_t const thrown = guarded(error, room, [&] {
    std::vector<std::string_view> texts;
    for (int32_t i = 0; i < parts; ++i) texts.emplace_back(part[i], sizes[i]);
    RawCommand command(texts);
    if (node != nullptr) {
      auto const [host, port] = split_endpoint(node);
      command.pinned = client_of(client).topology.node(host, port);
    } else if (parts > 1) {
      command.slot = key_slot(texts[1]);
    }
    std::string trouble = client_of(client).execute(command, deadline_us);
    answered = command.answered;
    if (answered) reply(command.reply.data(), command.reply.size(), context);
    return trouble;
  });
  return thrown || !answered;
}

int32_t hstu_trt_remote_nodes(HstuTrtRemoteClient* client, HstuTrtRemoteReply reply, void* context) {
  return guarded(nullptr, 0, [&] {
    std::string lines;
    for (Node* node : client_of(client).topology.nodes())
      lines += node->name() + (node->breaker.is_open() ? " open\n" : " closed\n");
    reply(lines.data(), lines.size(), context);
    return std::string();
  });
}

#define HSTU_TRT_NAME(name) #name ","
char const* hstu_trt_remote_counter_names(void) { return HSTU_TRT_REMOTE_COUNTERS(HSTU_TRT_NAME); }

void hstu_trt_remote_counters(HstuTrtRemoteClient* client, uint64_t* values) {
  Counters const& counters = client_of(client).counters;
#define HSTU_TRT_VALUE(name) *values++ = counters.name;
  HSTU_TRT_REMOTE_COUNTERS(HSTU_TRT_VALUE)
}

uint32_t hstu_trt_remote_partition(HstuTrtRemoteTable const* table, int64_t row) {
  return reinterpret_cast<Table const*>(table)->partition_of(row);
}

int32_t hstu_trt_remote_slot(char const* key, size_t size) { return key_slot({key, size}); }
