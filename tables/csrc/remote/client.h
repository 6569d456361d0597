// SPDX-License-Identifier: Apache-2.0
// What the threads of a process share: the cluster's map, breakers, idle connections and counters.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "capi.h"
#include "connection.h"
#include "rows.h"
#include "tls.h"
#include "topology.h"

namespace hstu_trt::remote {

#define HSTU_TRT_REMOTE_COUNTERS(X) \
  X(requests)                       \
  X(rows_asked)                     \
  X(rows_found)                     \
  X(rows_missing)                   \
  X(rows_refused)                   \
  X(rows_unavailable)               \
  X(rows_written)                   \
  X(commands)                       \
  X(bytes_received)                 \
  X(replica_commands)               \
  X(connects)                       \
  X(node_failures)                  \
  X(node_timeouts)                  \
  X(breaker_opened)                 \
  X(breaker_skips)                  \
  X(moved)                          \
  X(ask)                            \
  X(map_refreshes)                  \
  X(auth_failures)                  \
  X(protocol_errors)

struct Counters {
#define HSTU_TRT_DECLARE(name) std::atomic<uint64_t> name{0};
  HSTU_TRT_REMOTE_COUNTERS(HSTU_TRT_DECLARE)
#undef HSTU_TRT_DECLARE
};

// Connections that one request at a time uses, at most one per node.
struct Session {
  Session();
  ~Session();
  Session(Session const&) = delete;
  Session& operator=(Session const&) = delete;

  int const epoll;
  // By Node::index; null: none.
  std::vector<std::unique_ptr<Connection>> connections;
  std::vector<Grouping> groupings;
};

struct Settings {
  std::vector<std::string> seeds;
  Login login;
  int breaker_failures = 3;
  int64_t breaker_open_us = 500'000;
  uint32_t rows_per_command = 512;
  bool replica_reads = true;
};

class Client {
 public:
  // Connects and reads the slot map. Throws std::runtime_error.
  Client(Settings settings, std::unique_ptr<TlsContext> tls, int64_t deadline_us);

  // Fill the status of every row; return what went wrong first, or "".
  std::string read(HstuTrtRemoteJob const* jobs, size_t count, int64_t deadline_us);
  std::string write(HstuTrtRemoteJob const& job, int64_t deadline_us);
  // Runs one command; returns what went wrong, if no node answered.
  std::string execute(RawCommand& command, int64_t deadline_us);

  Settings const settings;
  std::unique_ptr<TlsContext> const tls;
  Topology topology;
  Counters counters;
  // Place of the node that is asked for the slot map next.
  std::atomic<size_t> next_asked{0};

 private:
  class Lease;

  std::string run(std::vector<Command*> commands, Session& session, int64_t deadline_us);
  void count_rows(HstuTrtRemoteJob const& job, Grouping const& grouping);

  std::mutex mutex_;
  std::vector<std::unique_ptr<Session>> idle_;
};

}  // namespace hstu_trt::remote
