// SPDX-License-Identifier: Apache-2.0
#include "tls.h"

#include <arpa/inet.h>
#include <dlfcn.h>

#include <stdexcept>

namespace hstu_trt::remote {

// The functions used, with opaque pointers, so that OpenSSL's headers are not needed either.
struct OpenSsl {
  void* (*TLS_client_method)();
  void* (*SSL_CTX_new)(void*);
  void (*SSL_CTX_free)(void*);
  long (*SSL_CTX_ctrl)(void*, int, long, void*);
  int (*SSL_CTX_load_verify_locations)(void*, char const*, char const*);
  int (*SSL_CTX_set_default_verify_paths)(void*);
  int (*SSL_CTX_use_certificate_chain_file)(void*, char const*);
  int (*SSL_CTX_use_PrivateKey_file)(void*, char const*, int);
  void (*SSL_CTX_set_verify)(void*, int, void*);
  void* (*SSL_new)(void*);
  void (*SSL_free)(void*);
  void (*SSL_set_bio)(void*, void*, void*);
  void (*SSL_set_connect_state)(void*);
  int (*SSL_read)(void*, void*, int);
  int (*SSL_write)(void*, void const*, int);
  int (*SSL_get_error)(void const*, int);
  long (*SSL_get_verify_result)(void const*);
  void* (*SSL_get0_param)(void*);
  int (*X509_VERIFY_PARAM_set1_host)(void*, char const*, size_t);
  int (*X509_VERIFY_PARAM_set1_ip_asc)(void*, char const*);
  char const* (*X509_verify_cert_error_string)(long);
  void* (*BIO_new)(void const*);
  void const* (*BIO_s_mem)();
  int (*BIO_read)(void*, void*, int);
  int (*BIO_write)(void*, void const*, int);
  size_t (*BIO_ctrl_pending)(void*);
  unsigned long (*ERR_get_error)();
  void (*ERR_error_string_n)(unsigned long, char*, size_t);
  void (*ERR_clear_error)();
};

namespace {

// From OpenSSL's headers.
constexpr int kFileTypePem = 1;
constexpr int kVerifyPeer = 1;
constexpr int kSetMinProtoVersion = 123;
constexpr long kTls12 = 0x0303;
constexpr int kErrorWantRead = 2;
constexpr int kErrorZeroReturn = 6;
constexpr int kLargestWrite = 1 << 20;
// Plain bytes of a record, RFC 8446 section 5.1.
constexpr int kLargestRecord = 1 << 14;

template <typename Function>
void bind(void* library, char const* name, Function*& function) {
  // dlsym looks through what the library depends on too, libcrypto among it.
  function = reinterpret_cast<Function*>(dlsym(library, name));
  if (function == nullptr) throw std::runtime_error(std::string("TLS: libssl.so.3 has no ") + name);
}

OpenSsl load() {
  void* library = dlopen("libssl.so.3", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(std::string("TLS needs OpenSSL 3: ") + dlerror());
  OpenSsl ssl{};
#define HSTU_TRT_BIND(name) bind(library, #name, ssl.name)
  HSTU_TRT_BIND(TLS_client_method);
  HSTU_TRT_BIND(SSL_CTX_new);
  HSTU_TRT_BIND(SSL_CTX_free);
  HSTU_TRT_BIND(SSL_CTX_ctrl);
  HSTU_TRT_BIND(SSL_CTX_load_verify_locations);
  HSTU_TRT_BIND(SSL_CTX_set_default_verify_paths);
  HSTU_TRT_BIND(SSL_CTX_use_certificate_chain_file);
  HSTU_TRT_BIND(SSL_CTX_use_PrivateKey_file);
  HSTU_TRT_BIND(SSL_CTX_set_verify);
  HSTU_TRT_BIND(SSL_new);
  HSTU_TRT_BIND(SSL_free);
  HSTU_TRT_BIND(SSL_set_bio);
  HSTU_TRT_BIND(SSL_set_connect_state);
  HSTU_TRT_BIND(SSL_read);
  HSTU_TRT_BIND(SSL_write);
  HSTU_TRT_BIND(SSL_get_error);
  HSTU_TRT_BIND(SSL_get_verify_result);
  HSTU_TRT_BIND(SSL_get0_param);
  HSTU_TRT_BIND(X509_VERIFY_PARAM_set1_host);
  HSTU_TRT_BIND(X509_VERIFY_PARAM_set1_ip_asc);
  HSTU_TRT_BIND(X509_verify_cert_error_string);
  HSTU_TRT_BIND(BIO_new);
  HSTU_TRT_BIND(BIO_s_mem);
  HSTU_TRT_BIND(BIO_read);
  HSTU_TRT_BIND(BIO_write);
  HSTU_TRT_BIND(BIO_ctrl_pending);
  HSTU_TRT_BIND(ERR_get_error);
  HSTU_TRT_BIND(ERR_error_string_n);
  HSTU_TRT_BIND(ERR_clear_error);
#undef HSTU_TRT_BIND
  return ssl;
}

OpenSsl const& open_ssl() {
  static OpenSsl const ssl = load();
  return ssl;
}

std::string reason(OpenSsl const& ssl) {
  char text[256] = "no reason given";
  if (unsigned long const code = ssl.ERR_get_error()) ssl.ERR_error_string_n(code, text, sizeof text);
  ssl.ERR_clear_error();
  return text;
}

bool is_address(std::string const& host) {
  unsigned char bytes[sizeof(in6_addr)];
  return inet_pton(AF_INET, host.c_str(), bytes) == 1 || inet_pton(AF_INET6, host.c_str(), bytes) == 1;
}

}  // namespace

TlsContext::TlsContext(TlsFiles const& files) : ssl_(open_ssl()), context_(ssl_.SSL_CTX_new(ssl_.TLS_client_method())) {
  auto const demand = [&](bool done, std::string const& what) {
    if (done) return;
    std::string const why = reason(ssl_);
    ssl_.SSL_CTX_free(context_);
    throw std::runtime_error("TLS: " + what + ": " + why);
  };
  demand(context_ != nullptr, "no context");
  demand(ssl_.SSL_CTX_ctrl(context_, kSetMinProtoVersion, kTls12, nullptr) == 1, "TLS 1.2");
  bool const trusts = files.authorities.empty()
                          ? ssl_.SSL_CTX_set_default_verify_paths(context_) == 1
                          : ssl_.SSL_CTX_load_verify_locations(context_, files.authorities.c_str(), nullptr) == 1;
  demand(trusts, "authorities " + files.authorities);
  ssl_.SSL_CTX_set_verify(context_, kVerifyPeer, nullptr);
  if (files.certificate.empty()) return;
  demand(ssl_.SSL_CTX_use_certificate_chain_file(context_, files.certificate.c_str()) == 1,
         "certificate " + files.certificate);
  demand(ssl_.SSL_CTX_use_PrivateKey_file(context_, files.key.c_str(), kFileTypePem) == 1, "key " + files.key);
}

TlsContext::~TlsContext() { ssl_.SSL_CTX_free(context_); }

TlsStream::TlsStream(TlsContext const& context, std::string const& host)
    : ssl_(context.ssl_),
      stream_(ssl_.SSL_new(context.context_)),
      from_wire_(ssl_.BIO_new(ssl_.BIO_s_mem())),
      to_wire_(ssl_.BIO_new(ssl_.BIO_s_mem())) {
  if (stream_ == nullptr || from_wire_ == nullptr || to_wire_ == nullptr) throw std::runtime_error("TLS: no memory");
  ssl_.SSL_set_bio(stream_, from_wire_, to_wire_);
  ssl_.SSL_set_connect_state(stream_);
  void* param = ssl_.SSL_get0_param(stream_);
  int const named = is_address(host) ? ssl_.X509_VERIFY_PARAM_set1_ip_asc(param, host.c_str())
                                     : ssl_.X509_VERIFY_PARAM_set1_host(param, host.c_str(), host.size());
  if (named == 1) return;
  ssl_.SSL_free(stream_);
  throw std::runtime_error("TLS: " + host + " is no host to verify");
}

TlsStream::~TlsStream() { ssl_.SSL_free(stream_); }

void TlsStream::encrypt(std::string& plain, std::string& wire) {
  size_t taken = 0;
  while (taken < plain.size()) {
    int const size = static_cast<int>(std::min<size_t>(plain.size() - taken, kLargestWrite));
    int const written = ssl_.SSL_write(stream_, plain.data() + taken, size);
    if (written <= 0) {
      check(written, "write");
      break;
    }
    taken += written;
  }
  plain.erase(0, taken);
  collect(wire);
}

void TlsStream::decrypt(std::string_view wire_in, ReplyReader& plain, std::string& wire_out) {
  if (ssl_.BIO_write(from_wire_, wire_in.data(), static_cast<int>(wire_in.size())) <= 0)
    throw std::runtime_error("TLS: no memory");
  for (;;) {
    int const read = ssl_.SSL_read(stream_, plain.space(kLargestRecord), kLargestRecord);
    if (read <= 0) {
      check(read, "read");
      break;
    }
    plain.filled(read);
  }
  collect(wire_out);
}

void TlsStream::collect(std::string& wire) {
  size_t const pending = ssl_.BIO_ctrl_pending(to_wire_);
  if (pending == 0) return;
  size_t const before = wire.size();
  wire.resize(before + pending);
  ssl_.BIO_read(to_wire_, wire.data() + before, static_cast<int>(pending));
}

void TlsStream::check(int result, char const* what) {
  int const error = ssl_.SSL_get_error(stream_, result);
  if (error == kErrorWantRead || error == kErrorZeroReturn) return;
  long const verified = ssl_.SSL_get_verify_result(stream_);
  std::string const why = verified ? ssl_.X509_verify_cert_error_string(verified) : reason(ssl_);
  ssl_.ERR_clear_error();
  throw std::runtime_error(std::string("TLS ") + what + ": " + why);
}

}  // namespace hstu_trt::remote
