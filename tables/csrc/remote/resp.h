// SPDX-License-Identifier: Apache-2.0
// RESP2: commands as bytes, and replies as tokens while they arrive.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace hstu_trt::remote {

// Longest value that is kept; rows are at most this long.
inline constexpr int64_t kMaxBulk = 1 << 20;

// What came is no RESP2; the connection is of no more use.
struct ProtocolError : std::runtime_error {
  using runtime_error::runtime_error;
};

void append_array(std::string& out, size_t parts);
void append_bulk(std::string& out, std::string_view part);

struct Token {
  enum class Kind { kStatus, kError, kInteger, kBulk, kNil, kArray, kOversize };
  Kind kind;
  // Content of a status, error or bulk, valid until the reader is used again.
  std::string_view text;
  // Value of an integer, length of an array or bulk.
  int64_t number;
  // All bytes of the token; of an oversized bulk only its header.
  std::string_view raw;
};

// Bytes in, tokens out.
class ReplyReader {
 public:
  // Room at the end for so many bytes; `filled` says how many came.
  char* space(size_t bytes);
  void filled(size_t bytes) { tail_ += bytes; }

  // The next token, or false if its bytes have not all come. A bulk above kMaxBulk is told, then passed over.
  bool next(Token* token);

 private:
  bool bulk(int64_t length, size_t header, Token* token);

  std::vector<char> buffer_;
  size_t head_ = 0;
  size_t tail_ = 0;
  size_t skip_ = 0;
};

// Counts the tokens of one reply, arrays in arrays included.
class ReplyFrame {
 public:
  // True if this token completes the reply.
  bool take(Token const& token) {
    remaining_ += token.kind == Token::Kind::kArray ? token.number - 1 : -1;
    return remaining_ == 0;
  }

 private:
  int64_t remaining_ = 1;
};

}  // namespace hstu_trt::remote
