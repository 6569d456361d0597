// SPDX-License-Identifier: Apache-2.0
#include "connection.h"

#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace hstu_trt::remote {
namespace {

// What a nearby cache holds: bytes are taken to their rows before others come.
constexpr size_t kReceive = 1 << 16;

std::string error_text(int error) { return strerrorname_np(error) ? strerrordesc_np(error) : "unknown error"; }

}  // namespace

Connection::Connection(Node& node, int epoll, Login const& login, TlsContext const* tls)
    : node(node), progress_us(now_us()) {
  open(epoll, tls);
  if (broken.empty()) greet(login);
}

Connection::~Connection() {
  if (socket_ >= 0) close(socket_);
}

void Connection::open(int epoll, TlsContext const* tls) {
  if (node.address.length == 0) return fail("its name has no address");
  socket_ = socket(node.address.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (socket_ < 0) return fail(error_text(errno));
  int const on = 1;
  setsockopt(socket_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  auto const* address = reinterpret_cast<sockaddr const*>(&node.address.storage);
  if (connect(socket_, address, node.address.length) != 0 && errno != EINPROGRESS) return fail(error_text(errno));
  epoll_event event{};
  event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET;
  event.data.ptr = this;
  if (epoll_ctl(epoll, EPOLL_CTL_ADD, socket_, &event) != 0) return fail(error_text(errno));
  try {
    if (tls != nullptr) tls_ = std::make_unique<TlsStream>(*tls, node.host);
  } catch (std::runtime_error const& error) {
    fail(error.what());
  }
}

void Connection::greet(Login const& login) {
  if (!login.password.empty()) {
    append_array(out, login.user.empty() ? 2 : 3);
    append_bulk(out, "AUTH");
    if (!login.user.empty()) append_bulk(out, login.user);
    append_bulk(out, login.password);
    due.push_back({Due::Kind::kAuth, nullptr, {}});
  }
  append_array(out, 1);
  append_bulk(out, "READONLY");
  due.push_back({Due::Kind::kIgnored, nullptr, {}});
}

void Connection::fail(std::string why) {
  if (broken.empty()) broken = std::move(why);
}

void Connection::flush() {
  if (!broken.empty()) return;
  try {
    if (tls_ != nullptr) tls_->encrypt(out, wire_);
  } catch (std::runtime_error const& error) {
    return fail(error.what());
  }
  std::string& bytes = tls_ != nullptr ? wire_ : out;
  while (sent_ < bytes.size()) {
    ssize_t const sent = send(socket_, bytes.data() + sent_, bytes.size() - sent_, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0 && (errno == EAGAIN || errno == ENOTCONN)) return;
    if (sent < 0) return fail(error_text(errno));
    sent_ += static_cast<size_t>(sent);
    // A node that takes bytes is alive; of a long write, replies come only at the end.
    progress_us = now_us();
  }
  bytes.clear();
  sent_ = 0;
}

bool Connection::receive(bool closing) {
  if (!broken.empty()) return false;
  if (tls_ != nullptr) received_.resize(kReceive);
  char* const space = tls_ != nullptr ? received_.data() : in.space(kReceive);
  ssize_t const received = recv(socket_, space, kReceive, 0);
  if (received < 0 && errno == EINTR) return true;
  if (received < 0 && (errno == EAGAIN || errno == ENOTCONN)) return false;
  if (received <= 0) {
    fail(received < 0 ? error_text(errno) : "it closed the connection");
    return false;
  }
  bytes_received += received;
  progress_us = now_us();
  stale = false;
  bool const is_drained = static_cast<size_t>(received) < kReceive && !closing;
  if (tls_ == nullptr) {
    in.filled(static_cast<size_t>(received));
    return !is_drained;
  }
  try {
    tls_->decrypt({received_.data(), static_cast<size_t>(received)}, in, wire_);
    // The handshake's end lets waiting commands go.
    flush();
  } catch (std::runtime_error const& error) {
    fail(error.what());
  }
  return !is_drained;
}

}  // namespace hstu_trt::remote
