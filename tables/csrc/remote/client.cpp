// SPDX-License-Identifier: Apache-2.0
#include "client.h"

#include <sys/epoll.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>

#include "exchange.h"

namespace hstu_trt::remote {

Session::Session() : epoll(epoll_create1(EPOLL_CLOEXEC)) {
  if (epoll < 0) throw std::runtime_error(std::string("epoll: ") + std::strerror(errno));
}

Session::~Session() {
  connections.clear();
  close(epoll);
}

// A session for one request. Sessions whose request ended otherwise than by an exception are used again.
class Client::Lease {
 public:
  explicit Lease(Client& client) : client_(client) {
    {
      std::lock_guard const lock(client_.mutex_);
      if (!client_.idle_.empty()) {
        session_ = std::move(client_.idle_.back());
        client_.idle_.pop_back();
      }
    }
    if (session_ == nullptr) session_ = std::make_unique<Session>();
  }
  void give_back() {
    std::lock_guard const lock(client_.mutex_);
    client_.idle_.push_back(std::move(session_));
  }
  Session& operator*() { return *session_; }

 private:
  Client& client_;
  std::unique_ptr<Session> session_;
};

Client::Client(Settings settings, std::unique_ptr<TlsContext> tls, int64_t deadline_us)
    : settings(std::move(settings)),
      tls(std::move(tls)),
      topology(this->settings.breaker_failures, this->settings.breaker_open_us) {
  int64_t const deadline = now_us() + deadline_us;
  std::string trouble = "no node is named";
  size_t left = this->settings.seeds.size();
  for (std::string const& seed : this->settings.seeds) {
    auto const [host, port] = split_endpoint(seed);
    RawCommand slots({"CLUSTER", "SLOTS"});
    slots.pinned = topology.node(host, port);
    // One silent seed must leave time for the others.
    trouble = execute(slots, std::max<int64_t>(0, deadline - now_us()) / static_cast<int64_t>(left--));
    if (trouble.empty() && slots.reply[0] == '-') trouble = "node " + seed + " answered: " + slots.reply.substr(1);
    if (!trouble.empty()) continue;
    topology.replace(slots.reply, *slots.pinned);
    if (topology.map()->owners.size() > 1) return;
    trouble = "node " + seed + " knows no node that serves slots";
  }
  while (!trouble.empty() && (trouble.back() == '\n' || trouble.back() == '\r')) trouble.pop_back();
  throw std::runtime_error(trouble);
}

std::string Client::run(std::vector<Command*> commands, Session& session, int64_t deadline_us) {
  Exchange exchange(*this, session, deadline_us);
  exchange.run(commands);
  return exchange.trouble();
}

std::string Client::execute(RawCommand& command, int64_t deadline_us) {
  Lease session(*this);
  std::string const trouble = run({&command}, *session, deadline_us);
  session.give_back();
  if (command.answered) return "";
  return trouble.empty() ? "no node serves slot " + std::to_string(command.slot) : trouble;
}

std::string Client::read(HstuTrtRemoteJob const* jobs, size_t count, int64_t deadline_us) {
  Lease lease(*this);
  Session& session = *lease;
  session.groupings.resize(std::max(session.groupings.size(), count));
  std::vector<ReadRows> reads;
  for (size_t job = 0; job < count; ++job) {
    session.groupings[job].sort(jobs[job], settings.rows_per_command);
    for (Grouping::Range const& range : session.groupings[job].ranges())
      reads.emplace_back(jobs[job], session.groupings[job], range);
  }
  std::vector<Command*> commands;
  for (ReadRows& read : reads) commands.push_back(&read);
  std::string const trouble = run(std::move(commands), session, deadline_us);
  ++counters.requests;
  for (size_t job = 0; job < count; ++job) count_rows(jobs[job], session.groupings[job]);
  lease.give_back();
  return trouble;
}

// Counts the distinct rows, then fills in what was asked for once: the twins, and zeros for rows that are none.
void Client::count_rows(HstuTrtRemoteJob const& job, Grouping const& grouping) {
  size_t const row_bytes = reinterpret_cast<Table const*>(job.table)->row_bytes;
  std::array<uint64_t, 256> by_status{};
  for (uint32_t i = 0; i < grouping.distinct(); ++i) ++by_status[job.status[grouping.first(i)]];
  counters.rows_asked += grouping.distinct();
  counters.rows_found += by_status[HSTU_TRT_ROW_FOUND];
  counters.rows_missing += by_status[HSTU_TRT_ROW_MISSING];
  counters.rows_refused += by_status[HSTU_TRT_ROW_REFUSED];
  counters.rows_unavailable += by_status[HSTU_TRT_ROW_UNAVAILABLE];
  grouping.for_twins([&](uint32_t from, uint32_t to) {
    std::memcpy(job.values + to * job.stride, job.values + from * job.stride, row_bytes);
    job.status[to] = job.status[from];
  });
  for (int64_t place = 0; place < job.count; ++place) {
    if (job.rows[place] >= 0) continue;
    std::memset(job.values + place * job.stride, 0, row_bytes);
    job.status[place] = HSTU_TRT_ROW_SKIPPED;
  }
}

std::string Client::write(HstuTrtRemoteJob const& job, int64_t deadline_us) {
  Lease lease(*this);
  Session& session = *lease;
  session.groupings.resize(std::max<size_t>(session.groupings.size(), 1));
  Grouping& grouping = session.groupings[0];
  grouping.sort(job, settings.rows_per_command);
  std::vector<WriteRows> writes;
  for (Grouping::Range const& range : grouping.ranges()) writes.emplace_back(job, grouping, range);
  std::vector<Command*> commands;
  for (WriteRows& write : writes) commands.push_back(&write);
  std::string const trouble = run(std::move(commands), session, deadline_us);
  for (uint32_t i = 0; i < grouping.distinct(); ++i)
    counters.rows_written += job.status[grouping.first(i)] == HSTU_TRT_ROW_FOUND;
  lease.give_back();
  return trouble;
}

}  // namespace hstu_trt::remote
