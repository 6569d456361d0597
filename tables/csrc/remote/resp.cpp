// SPDX-License-Identifier: Apache-2.0
#include "resp.h"

#include <algorithm>
#include <charconv>
#include <cstring>

namespace hstu_trt::remote {
namespace {

constexpr size_t kLongestLine = 1 << 16;
constexpr int64_t kLongestArray = 1 << 20;
constexpr size_t kFirstBuffer = 1 << 17;

void append_header(std::string& out, char kind, size_t number) {
  char text[24];
  text[0] = kind;
  char* end = std::to_chars(text + 1, text + sizeof text - 2, number).ptr;
  *end++ = '\r';
  *end++ = '\n';
  out.append(text, end);
}

int64_t whole_number(std::string_view text) {
  int64_t number = 0;
  auto const [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size()) throw ProtocolError("a length is no number");
  return number;
}

}  // namespace

void append_array(std::string& out, size_t parts) { append_header(out, '*', parts); }

void append_bulk(std::string& out, std::string_view part) {
  append_header(out, '$', part.size());
  out.append(part).append("\r\n", 2);
}

char* ReplyReader::space(size_t bytes) {
  if (head_ == tail_) head_ = tail_ = 0;
  if (buffer_.size() - tail_ < bytes && head_ > 0) {
    std::memmove(buffer_.data(), buffer_.data() + head_, tail_ - head_);
    tail_ -= head_;
    head_ = 0;
  }
  if (buffer_.size() - tail_ < bytes) buffer_.resize(std::max({kFirstBuffer, 2 * buffer_.size(), tail_ + bytes}));
  return buffer_.data() + tail_;
}

bool ReplyReader::next(Token* token) {
  size_t const skipped = std::min(skip_, tail_ - head_);
  head_ += skipped;
  skip_ -= skipped;
  if (head_ == tail_) return false;
  char const* begin = buffer_.data() + head_;
  void const* newline = std::memchr(begin, '\n', std::min(tail_ - head_, kLongestLine));
  if (newline == nullptr) {
    if (tail_ - head_ >= kLongestLine) throw ProtocolError("a line does not end");
    return false;
  }
  size_t const header = static_cast<char const*>(newline) - begin + 1;
  if (header < 3 || begin[header - 2] != '\r') throw ProtocolError("a line does not end in CR LF");
  *token = Token{Token::Kind::kStatus, {begin + 1, header - 3}, 0, {begin, header}};
  switch (*begin) {
    case '+': break;
    case '-': token->kind = Token::Kind::kError; break;
    case ':':
      token->kind = Token::Kind::kInteger;
      token->number = whole_number(token->text);
      break;
    case '$': return bulk(whole_number(token->text), header, token);
    case '*':
      token->number = whole_number(token->text);
      if (token->number < -1 || token->number > kLongestArray) throw ProtocolError("an array's length is out of range");
      token->kind = token->number < 0 ? Token::Kind::kNil : Token::Kind::kArray;
      break;
    default: throw ProtocolError("a reply begins with an unknown character");
  }
  head_ += header;
  return true;
}

bool ReplyReader::bulk(int64_t length, size_t header, Token* token) {
  if (length < -1) throw ProtocolError("a value's length is negative");
  token->number = length;
  if (length < 0 || length > kMaxBulk) {
    token->kind = length < 0 ? Token::Kind::kNil : Token::Kind::kOversize;
    skip_ = length < 0 ? 0 : static_cast<size_t>(length) + 2;
    head_ += header;
    return true;
  }
  size_t const whole = header + static_cast<size_t>(length) + 2;
  if (tail_ - head_ < whole) return false;
  char const* begin = buffer_.data() + head_;
  if (std::memcmp(begin + whole - 2, "\r\n", 2) != 0) throw ProtocolError("a value does not end in CR LF");
  token->kind = Token::Kind::kBulk;
  token->text = {begin + header, static_cast<size_t>(length)};
  token->raw = {begin, whole};
  head_ += whole;
  return true;
}

}  // namespace hstu_trt::remote
