// SPDX-License-Identifier: Apache-2.0
// One request: its commands go to their nodes, side by side, until each has a reply or the deadline has come.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "client.h"
#include "command.h"

namespace hstu_trt::remote {

// A read goes to the slot's master, and to a replica if the master is down, silent for half the time, or known to be
// down. A write goes to the master alone. What no node answers is told to the command, never thrown.
class Exchange {
 public:
  Exchange(Client& client, Session& session, int64_t deadline_us);

  void run(std::vector<Command*> const& commands);

  // What went wrong first, or "".
  std::string const& trouble() const { return trouble_; }

 private:
  // Where a command goes.
  void route(Command& command);
  Node* choose(Command& command);
  bool usable(Node& node);
  void send(Command& command, Node& node, bool asking);
  Connection& connection(Node& node);
  void give_up(Command& command);

  // What comes back.
  void wait(int64_t now);
  void read_replies(Connection& connection, bool closing);
  void take(Connection& connection, Token const& token);
  void complete(Connection& connection, Due& due);
  void command_error(Connection& connection, Command& command, std::string_view error);
  Node* redirect_target(Connection const& connection, Command const& command, std::string_view error);
  void redirect(Connection& connection, Command& command, std::string_view error, bool asking);

  // What goes wrong.
  bool close_broken();
  void close(Connection& connection);
  void close_silent(int64_t now);
  bool has_alternative(Connection const& connection);
  void expire();
  void node_failed(Node& node, std::string const& why);

  void ask_for_map();

  Client& client_;
  Session& session_;
  Counters& counters_;
  int64_t const started_us_;
  int64_t const deadline_us_;
  // How long a node may be silent before a replica is asked instead.
  int64_t const patience_us_;
  size_t pending_ = 0;
  std::string trouble_;
};

}  // namespace hstu_trt::remote
