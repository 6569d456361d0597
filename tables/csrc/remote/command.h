// SPDX-License-Identifier: Apache-2.0
// A command to a cluster: where it may go, its bytes, and what becomes of its reply.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "resp.h"
#include "topology.h"

namespace hstu_trt::remote {

class Command {
 public:
  virtual ~Command() = default;

  virtual void encode(std::string& out) const = 0;
  // The next token of a reply that is no error. After a failed attempt the reply begins anew.
  virtual void take(Token const& token) = 0;
  // A new attempt begins.
  virtual void restart() {}
  // The node's own error, e.g. WRONGTYPE.
  virtual void refused(std::string_view error) = 0;
  // No node could be asked in time.
  virtual void unavailable() = 0;

  bool was_at(Node const* node) const {
    return std::find(tried_.begin(), tried_.begin() + tries_, node) != tried_.begin() + tries_;
  }
  // Further attempts than fit are as good as at a node tried before.
  void went_to(Node const* node) {
    if (tries_ < tried_.size()) tried_[tries_++] = node;
  }
  bool is_exhausted() const { return tries_ == tried_.size(); }
  // Forgets the last attempt: it did not count.
  void take_back() { --tries_; }

  int slot = 0;
  // The only node it may go to; null: any that serves the slot.
  Node* pinned = nullptr;
  bool reads_only = false;
  bool at_replica = false;
  int redirects = 0;

 private:
  std::array<Node const*, 6> tried_{};
  size_t tries_ = 0;
};

// Any command; its reply is kept as bytes.
class RawCommand : public Command {
 public:
  explicit RawCommand(std::vector<std::string_view> parts) : parts_(std::move(parts)) {}

  void encode(std::string& out) const override {
    append_array(out, parts_.size());
    for (std::string_view const part : parts_) append_bulk(out, part);
  }
  void restart() override { reply.clear(); }
  void take(Token const& token) override {
    if (token.kind == Token::Kind::kOversize) throw ProtocolError("a value is too long");
    reply.append(token.raw);
  }
  void refused(std::string_view error) override {
    reply.assign("-").append(error).append("\r\n");
    answered = true;
  }
  void unavailable() override { answered = false; }

  std::string reply;
  bool answered = true;

 private:
  std::vector<std::string_view> parts_;
};

}  // namespace hstu_trt::remote
