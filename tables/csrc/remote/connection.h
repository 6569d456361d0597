// SPDX-License-Identifier: Apache-2.0
// A non-blocking connection to one node, and the replies that are due on it.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "resp.h"
#include "tls.h"
#include "topology.h"

namespace hstu_trt::remote {

class Command;

// A reply that is due. The client's own commands belong to no Command.
struct Due {
  enum class Kind { kCommand, kAuth, kIgnored, kSlots };
  Kind kind;
  Command* command = nullptr;
  ReplyFrame frame;
  bool begun = false;
};

struct Login {
  std::string user;
  std::string password;
};

class Connection {
 public:
  // Begins to connect and queues AUTH (if there is a password) and READONLY, so that a replica answers reads.
  Connection(Node& node, int epoll, Login const& login, TlsContext const* tls);
  ~Connection();
  Connection(Connection const&) = delete;
  Connection& operator=(Connection const&) = delete;

  // Sends what is queued in `out`, as far as the socket takes it.
  void flush();
  // Receives up to one buffer; true if there may be more. Both set `broken` on an error. `closing`: the other side has
  // closed, so that what fills no whole buffer is followed by the end, of which no event will tell.
  bool receive(bool closing);
  void fail(std::string why);

  Node& node;
  // Commands to send; they leave with the next flush.
  std::string out;
  ReplyReader in;
  std::deque<Due> due;
  // Collects the reply to CLUSTER SLOTS.
  std::string slots;
  // Taken over from an earlier request, and silent so far: the server may have closed it meanwhile.
  bool stale = false;
  // When bytes last came, or when the request began to use it.
  int64_t progress_us = 0;
  // Commands of this request that wait for a reply.
  int waiting = 0;
  // Why it can be used no more; empty: it can.
  std::string broken;
  int64_t bytes_received = 0;

 private:
  void open(int epoll, TlsContext const* tls);
  void greet(Login const& login);

  int socket_ = -1;
  std::string wire_;
  size_t sent_ = 0;
  std::vector<char> received_;
  std::unique_ptr<TlsStream> tls_;
};

}  // namespace hstu_trt::remote
