// SPDX-License-Identifier: Apache-2.0
// The nodes of a cluster, and which of them serve a slot.
#pragma once

#include <netinet/in.h>
#include <sys/socket.h>

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "breaker.h"
#include "hashing.h"

namespace hstu_trt::remote {

struct Address {
  sockaddr_storage storage{};
  socklen_t length = 0;
};

// A server. Nodes live as long as their Topology.
struct Node {
  Node(size_t index, std::string host, int port, int failures, int64_t open_us);

  size_t const index;
  std::string const host;
  int const port;
  // Length 0 if the host's name has no address. A name is resolved once, when the node becomes known; that may block.
  Address const address;
  Breaker breaker;

  std::string name() const { return host + ":" + std::to_string(port); }
};

// Who serves a slot: a master (null if none) and its replicas.
struct Owners {
  Node* master = nullptr;
  std::vector<Node*> replicas;
};

// slot -> owners; never changed once published.
struct SlotMap {
  std::array<uint16_t, kSlots> owner_of{};
  // owners[0]: nobody
  std::vector<Owners> owners{1};
};

// Shared by all threads of a client.
class Topology {
 public:
  Topology(int breaker_failures, int64_t breaker_open_us)
      : breaker_failures_(breaker_failures), breaker_open_us_(breaker_open_us) {}

  Node* node(std::string_view host, int port);
  std::vector<Node*> nodes();
  std::shared_ptr<SlotMap const> map();

  // Replaces the map by the reply to CLUSTER SLOTS that `from` gave. Throws ProtocolError.
  void replace(std::string_view reply, Node const& from);
  // What a MOVED told: one slot has another master.
  void move_slot(int slot, Node* master);

  // True if the map is old or doubted, and nobody has asked for a new one lately; the caller then asks.
  bool claim_refresh(int64_t now_us);
  void doubt();

 private:
  int const breaker_failures_;
  int64_t const breaker_open_us_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Node>> nodes_;
  std::shared_ptr<SlotMap const> map_ = std::make_shared<SlotMap>();
  bool doubted_ = false;
  int64_t refreshed_us_ = 0;
};

// "host:port", the host perhaps in brackets. Throws std::invalid_argument.
std::pair<std::string, int> split_endpoint(std::string_view text);

int64_t now_us();

}  // namespace hstu_trt::remote
