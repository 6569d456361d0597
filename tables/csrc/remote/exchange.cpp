// SPDX-License-Identifier: Apache-2.0
#include "exchange.h"

#include <sys/epoll.h>

#include <algorithm>
#include <array>

namespace hstu_trt::remote {

Exchange::Exchange(Client& client, Session& session, int64_t deadline_us)
    : client_(client),
      session_(session),
      counters_(client.counters),
      started_us_(now_us()),
      deadline_us_(started_us_ + deadline_us),
      patience_us_(deadline_us / 2) {}

void Exchange::run(std::vector<Command*> const& commands) {
  for (auto const& connection : session_.connections) {
    if (connection == nullptr) continue;
    connection->stale = true;
    connection->waiting = 0;
    connection->progress_us = started_us_;
  }
  pending_ = commands.size();
  if (client_.topology.claim_refresh(started_us_)) ask_for_map();
  for (Command* command : commands) route(*command);
  while (pending_ > 0) {
    do {
      for (auto const& connection : session_.connections)
        if (connection != nullptr) connection->flush();
    } while (close_broken());
    if (pending_ == 0) break;
    int64_t const now = now_us();
    if (now >= deadline_us_) return expire();
    wait(now);
    close_silent(now_us());
  }
}

void Exchange::route(Command& command) {
  Node* node = command.is_exhausted() ? nullptr : choose(command);
  node != nullptr ? send(command, *node, false) : give_up(command);
}

Node* Exchange::choose(Command& command) {
  auto const fits = [&](Node* node) { return node != nullptr && !command.was_at(node) && usable(*node); };
  if (command.pinned != nullptr) return command.was_at(command.pinned) ? nullptr : command.pinned;
  auto const map = client_.topology.map();
  Owners const& owners = map->owners[map->owner_of[command.slot]];
  if (owners.master == nullptr) client_.topology.doubt();
  command.at_replica = false;
  if (fits(owners.master)) return owners.master;
  if (!command.reads_only || !client_.settings.replica_reads) return nullptr;
  command.at_replica = true;
  for (Node* replica : owners.replicas)
    if (fits(replica)) return replica;
  return nullptr;
}

bool Exchange::usable(Node& node) {
  if (node.index < session_.connections.size()) {
    Connection const* open = session_.connections[node.index].get();
    if (open != nullptr && open->waiting > 0) return open->broken.empty();
  }
  if (node.breaker.allow(now_us())) return true;
  ++counters_.breaker_skips;
  if (trouble_.empty()) trouble_ = "node " + node.name() + " is passed over since it failed";
  return false;
}

Connection& Exchange::connection(Node& node) {
  if (session_.connections.size() <= node.index) session_.connections.resize(node.index + 1);
  auto& connection = session_.connections[node.index];
  if (connection == nullptr) {
    connection = std::make_unique<Connection>(node, session_.epoll, client_.settings.login, client_.tls.get());
    ++counters_.connects;
  }
  return *connection;
}

void Exchange::send(Command& command, Node& node, bool asking) {
  Connection& to = connection(node);
  if (to.waiting == 0) to.progress_us = now_us();
  if (asking) {
    append_array(to.out, 1);
    append_bulk(to.out, "ASKING");
    to.due.push_back({Due::Kind::kIgnored, nullptr, {}});
  }
  command.went_to(&node);
  command.restart();
  command.encode(to.out);
  to.due.push_back({Due::Kind::kCommand, &command, {}});
  ++to.waiting;
  ++counters_.commands;
}

// Nobody waits for the reply; it is taken when it comes, perhaps by the next request. Each time another node is asked,
// so that one that is down, or out of the cluster, is not asked for ever.
void Exchange::ask_for_map() {
  std::vector<Node*> const nodes = client_.topology.nodes();
  for (size_t i = 0; i < nodes.size(); ++i) {
    Node& node = *nodes[client_.next_asked++ % nodes.size()];
    if (node.breaker.is_open()) continue;
    Connection& to = connection(node);
    append_array(to.out, 2);
    append_bulk(to.out, "CLUSTER");
    append_bulk(to.out, "SLOTS");
    to.due.push_back({Due::Kind::kSlots, nullptr, {}});
    return;
  }
}

void Exchange::give_up(Command& command) {
  command.unavailable();
  --pending_;
}

void Exchange::wait(int64_t now) {
  std::array<epoll_event, 64> events;
  int64_t until = deadline_us_;
  for (auto const& connection : session_.connections) {
    if (connection == nullptr || connection->waiting == 0) continue;
    int64_t const patience = connection->progress_us + patience_us_;
    if (patience > now) until = std::min(until, patience);
  }
  int const timeout_ms = static_cast<int>((until - now + 999) / 1000);
  int const ready = epoll_wait(session_.epoll, events.data(), events.size(), timeout_ms);
  for (int event = 0; event < ready; ++event) {
    auto& connection = *static_cast<Connection*>(events[event].data.ptr);
    connection.flush();
    read_replies(connection, (events[event].events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0);
  }
}

bool Exchange::close_broken() {
  bool closed = false;
  // By index: closing sends commands elsewhere, and that may add connections.
  for (size_t node = 0; node < session_.connections.size(); ++node) {
    auto const& connection = session_.connections[node];
    if (connection == nullptr || connection->broken.empty()) continue;
    close(*connection);
    closed = true;
  }
  return closed;
}

void Exchange::close(Connection& connection) {
  Node& node = connection.node;
  std::string const why = connection.broken;
  bool const stale = connection.stale && connection.waiting > 0;
  std::vector<Command*> waiting;
  for (Due const& due : connection.due)
    if (due.kind == Due::Kind::kCommand) waiting.push_back(due.command);
  session_.connections[node.index].reset();
  // A connection that the server closed between two requests says nothing about the server.
  if (!stale && !waiting.empty()) node_failed(node, why);
  for (Command* command : waiting) {
    if (stale) command->take_back();
    route(*command);
  }
}

void Exchange::node_failed(Node& node, std::string const& why) {
  ++counters_.node_failures;
  if (node.breaker.failed(now_us())) ++counters_.breaker_opened;
  client_.topology.doubt();
  if (trouble_.empty()) trouble_ = "node " + node.name() + ": " + why;
}

void Exchange::close_silent(int64_t now) {
  for (auto const& connection : session_.connections) {
    if (connection == nullptr || connection->waiting == 0 || !connection->broken.empty()) continue;
    if (now - connection->progress_us < patience_us_ || !has_alternative(*connection)) continue;
    ++counters_.node_timeouts;
    connection->stale = false;
    connection->fail("no reply for half of the time");
  }
}

bool Exchange::has_alternative(Connection const& connection) {
  for (Due const& due : connection.due) {
    if (due.kind != Due::Kind::kCommand || !due.command->reads_only || !client_.settings.replica_reads) continue;
    auto const map = client_.topology.map();
    for (Node* replica : map->owners[map->owner_of[due.command->slot]].replicas)
      if (!due.command->was_at(replica) && !replica->breaker.is_open()) return true;
  }
  return false;
}

void Exchange::expire() {
  for (auto& connection : session_.connections) {
    if (connection == nullptr || connection->waiting == 0) continue;
    ++counters_.node_timeouts;
    node_failed(connection->node, connection->broken.empty() ? "no reply in time" : connection->broken);
    for (Due const& due : connection->due)
      if (due.kind == Due::Kind::kCommand) give_up(*due.command);
    connection.reset();
  }
}

}  // namespace hstu_trt::remote
