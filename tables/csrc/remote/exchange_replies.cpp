// SPDX-License-Identifier: Apache-2.0
// The part of an exchange that takes replies: rows, errors, and "ask somebody else".
#include <charconv>
#include <stdexcept>
#include <utility>

#include "exchange.h"

namespace hstu_trt::remote {
namespace {

constexpr int kMostRedirects = 8;

bool starts_with(std::string_view text, std::string_view word) { return text.substr(0, word.size()) == word; }

// Errors by which a node says that another one might do.
bool is_elsewhere(std::string_view error) {
  for (char const* word : {"CLUSTERDOWN", "LOADING", "MASTERDOWN", "TRYAGAIN", "BUSY ", "UNBLOCKED"})
    if (starts_with(error, word)) return true;
  return false;
}

bool is_refused_login(std::string_view error) {
  return starts_with(error, "NOAUTH") || starts_with(error, "WRONGPASS") || starts_with(error, "NOPERM");
}

}  // namespace

void Exchange::read_replies(Connection& connection, bool closing) {
  int64_t const before = connection.bytes_received;
  try {
    bool more = true;
    while (more) {
      more = connection.receive(closing);
      Token token;
      while (connection.broken.empty() && connection.in.next(&token)) take(connection, token);
    }
  } catch (ProtocolError const& error) {
    ++counters_.protocol_errors;
    connection.fail(error.what());
  }
  counters_.bytes_received += static_cast<uint64_t>(connection.bytes_received - before);
}

void Exchange::take(Connection& connection, Token const& token) {
  if (connection.due.empty()) throw ProtocolError("it answered without being asked");
  Due& due = connection.due.front();
  bool const is_error = !due.begun && token.kind == Token::Kind::kError;
  due.begun = true;
  bool const is_last = due.frame.take(token);
  if (due.kind == Due::Kind::kSlots) connection.slots.append(token.raw);
  if (due.kind == Due::Kind::kCommand && !is_error) due.command->take(token);
  if (!is_last) return;
  Due done = due;
  connection.due.pop_front();
  if (done.kind == Due::Kind::kAuth && is_error) {
    ++counters_.auth_failures;
    // Not the rest of the text: it might repeat what was sent.
    connection.fail("it refused the login (" + std::string(token.text.substr(0, token.text.find(' '))) + ")");
  } else if (done.kind == Due::Kind::kCommand && is_error) {
    --connection.waiting;
    command_error(connection, *done.command, token.text);
  } else {
    complete(connection, done);
  }
}

void Exchange::complete(Connection& connection, Due& due) {
  if (due.kind == Due::Kind::kSlots) {
    std::string const reply = std::exchange(connection.slots, {});
    // Without the right to ask, MOVED alone keeps the map.
    if (reply[0] == '-') return;
    ++counters_.map_refreshes;
    client_.topology.replace(reply, connection.node);
  } else if (due.kind == Due::Kind::kCommand) {
    --connection.waiting;
    --pending_;
    connection.node.breaker.succeeded();
    if (due.command->at_replica) ++counters_.replica_commands;
  }
}

void Exchange::command_error(Connection& connection, Command& command, std::string_view error) {
  if (starts_with(error, "MOVED ")) {
    ++counters_.moved;
    return redirect(connection, command, error, false);
  }
  if (starts_with(error, "ASK ")) {
    ++counters_.ask;
    return redirect(connection, command, error, true);
  }
  if (trouble_.empty()) trouble_ = "node " + connection.node.name() + " answered: " + std::string(error);
  if (is_elsewhere(error)) {
    client_.topology.doubt();
    return route(command);
  }
  if (is_refused_login(error)) ++counters_.auth_failures;
  connection.node.breaker.succeeded();
  command.refused(error);
  --pending_;
}

// "MOVED <slot> <host>:<port>"; a node that knows no name leaves the host empty: it is the one that was asked.
Node* Exchange::redirect_target(Connection const& connection, Command const& command, std::string_view error) {
  int slot = -1;
  size_t const number = error.find(' ') + 1, endpoint = error.find(' ', number) + 1;
  std::from_chars(error.data() + number, error.data() + error.size(), slot);
  if (endpoint == 0 || slot != command.slot) return nullptr;
  std::string const text(error.substr(endpoint));
  try {
    auto const [host, port] = split_endpoint(text[0] == ':' ? connection.node.host + text : text);
    return client_.topology.node(host, port);
  } catch (std::invalid_argument const&) {
    return nullptr;
  }
}

void Exchange::redirect(Connection& connection, Command& command, std::string_view error, bool asking) {
  Node* target = redirect_target(connection, command, error);
  if (target == nullptr) {
    ++counters_.protocol_errors;
    connection.fail("it sent a command on to nowhere");
    // With commands under way, closing the connection counts the failure.
    if (connection.waiting == 0) node_failed(connection.node, connection.broken);
    return route(command);
  }
  if (!asking && target != &connection.node) client_.topology.move_slot(command.slot, target);
  if (++command.redirects > kMostRedirects || command.is_exhausted() || !usable(*target)) {
    if (trouble_.empty()) trouble_ = "node " + connection.node.name() + " sent a command on: " + std::string(error);
    return give_up(command);
  }
  send(command, *target, asking);
}

}  // namespace hstu_trt::remote
