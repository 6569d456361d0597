// SPDX-License-Identifier: Apache-2.0
// TLS by OpenSSL 3, which is loaded when the first client asks for it: without TLS the library needs none.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "resp.h"

namespace hstu_trt::remote {

struct TlsFiles {
  // Certificates to trust; empty: the system's.
  std::string authorities;
  // The client's own certificate and key, PEM; empty: none.
  std::string certificate;
  std::string key;
};

struct OpenSsl;

// Settings of all connections of a client. Nodes must show a certificate for the host or address they are reached by.
class TlsContext {
 public:
  // Throws std::runtime_error if OpenSSL cannot be loaded or a file is refused.
  explicit TlsContext(TlsFiles const& files);
  ~TlsContext();
  TlsContext(TlsContext const&) = delete;
  TlsContext& operator=(TlsContext const&) = delete;

 private:
  friend class TlsStream;
  OpenSsl const& ssl_;
  void* context_;
};

// One connection's TLS, between bytes of the wire and bytes of the protocol; it owns no socket.
class TlsStream {
 public:
  TlsStream(TlsContext const& context, std::string const& host);
  ~TlsStream();
  TlsStream(TlsStream const&) = delete;
  TlsStream& operator=(TlsStream const&) = delete;

  // Takes plain bytes, as many as it can, off the front of `plain`, and adds wire bytes. Throws std::runtime_error.
  void encrypt(std::string& plain, std::string& wire);
  // Takes wire bytes and adds plain bytes to the reader; may add wire bytes to answer. Throws std::runtime_error.
  void decrypt(std::string_view wire_in, ReplyReader& plain, std::string& wire_out);

 private:
  void collect(std::string& wire);
  void check(int result, char const* what);

  OpenSsl const& ssl_;
  void* stream_;
  void* from_wire_;
  void* to_wire_;
};

}  // namespace hstu_trt::remote
