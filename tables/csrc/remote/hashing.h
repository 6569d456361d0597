// SPDX-License-Identifier: Apache-2.0
// From a row to its partition, and from a key to its slot. tables/remote_layout.py says the same in Python.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace hstu_trt::remote {

inline constexpr int kSlots = 16384;

// The generator of Steele, Lea and Flood (OOPSLA 2014), with the row as its state.
inline uint64_t splitmix64(uint64_t state) {
  uint64_t z = state + 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// CRC16 of the Redis Cluster specification: XMODEM, polynomial 0x1021.
inline uint16_t crc16(std::string_view bytes) {
  static constexpr std::array<uint16_t, 256> kTable = [] {
    std::array<uint16_t, 256> table{};
    for (int value = 0; value < 256; ++value) {
      uint16_t crc = static_cast<uint16_t>(value << 8);
      for (int bit = 0; bit < 8; ++bit) crc = static_cast<uint16_t>(crc & 0x8000 ? crc << 1 ^ 0x1021 : crc << 1);
      table[value] = crc;
    }
    return table;
  }();
  uint16_t crc = 0;
  for (unsigned char const byte : bytes) crc = static_cast<uint16_t>(crc << 8 ^ kTable[(crc >> 8 ^ byte) & 0xFF]);
  return crc;
}

// Slot of a key: of what stands between its first '{' and the next '}', if that is not empty.
inline int key_slot(std::string_view key) {
  size_t const open = key.find('{');
  if (open != key.npos) {
    size_t const close = key.find('}', open + 1);
    if (close != key.npos && close != open + 1) key = key.substr(open + 1, close - open - 1);
  }
  return crc16(key) % kSlots;
}

}  // namespace hstu_trt::remote
