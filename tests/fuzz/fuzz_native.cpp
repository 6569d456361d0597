// SPDX-License-Identifier: Apache-2.0
// Mutated input for what reads bytes from strangers in C++: the plugin's JSON and tables, the remote client's replies.
// Built with sanitizers (make fuzz), so that a read out of bounds or an overflow ends it; anything but an exception of
// the kind that a reader announces ends it too, with the seed and round to repeat.
//
// usage: fuzz_native FOLDER SEED ROUNDS, where FOLDER is a tables folder with a table "items".
#include <netdb.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../plugins/csrc/trt/json.h"
#include "../../plugins/csrc/trt/stored_table.h"
#include "../../tables/csrc/remote/resp.h"
#include "../../tables/csrc/remote/topology.h"

// Names in replies are made up: nobody is asked for their addresses.
extern "C" int getaddrinfo(char const*, char const*, addrinfo const*, addrinfo**) { return EAI_NONAME; }

namespace {

namespace fs = std::filesystem;
namespace remote = hstu_trt::remote;
namespace trt = hstu_trt::trt;

uint64_t state = 0;

// The generator of Steele, Lea and Flood (OOPSLA 2014).
uint64_t draw(uint64_t below) {
  uint64_t z = state += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return (z ^ (z >> 31)) % below;
}

// What readers stumble over, put where something else stood.
char const* const kPieces[] = {
    "-1", "0", "1e308", "9007199254740992", "9223372036854775807", "18446744073709551616", "1.5", "-", "nan", "0x10",
    "\"", "\\", "\\u0000", "\\ud800", "[", "]", "{", "}", ",", ":", "null", "true", "..", "/", "\"\"", "[[[[[[[[[[[[[[[[",
    "\r\n", "$-1\r\n", "$1048577\r\n", "*1048577\r\n", "*-1\r\n", "*3\r\n", ":16384\r\n", "-ERR\r\n", "+", "$", "*",
};

std::string mutated(std::string text) {
  for (uint64_t change = 1 + draw(3); change > 0; --change) {
    size_t const at = draw(text.size() + 1), length = std::min<size_t>(draw(9), text.size() - at);
    switch (draw(6)) {
      case 0: text.erase(at, length); break;
      case 1: text.insert(at, text.substr(at, length)); break;
      case 2: text.replace(at, length, kPieces[draw(std::size(kPieces))]); break;
      case 3: text.insert(at, kPieces[draw(std::size(kPieces))]); break;
      case 4: text.resize(at); break;
      default:
        if (at < text.size()) text[at] = static_cast<char>(draw(256));
    }
  }
  return text;
}

std::string read(fs::path const& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

void write(fs::path const& path, std::string const& bytes) { std::ofstream(path, std::ios::binary) << bytes; }

void parse_json(std::string const& text) {
  try {
    trt::Json const document = trt::Json::parse(text);
    (void)document.at("tables").at("items").at("rows").count();
  } catch (std::invalid_argument const&) {
  }
}

// The folder's table by its name, with whichever of the two signatures there is.
template <typename Text>
void find_table(Text const& folder, Text const& name) {
  try {
    if constexpr (requires { trt::find_stored_table(folder, name); }) {
      (void)trt::find_stored_table(folder, name);
    } else {
      (void)trt::find_stored_table(name);
    }
  } catch (std::runtime_error const&) {
  }
}

// Tokens that come in pieces of any length.
void read_tokens(std::string const& bytes) {
  remote::ReplyReader reader;
  remote::ReplyFrame frame;
  size_t at = 0;
  try {
    while (at < bytes.size()) {
      size_t const piece = std::min<size_t>(1 + draw(64), bytes.size() - at);
      std::memcpy(reader.space(piece), bytes.data() + at, piece);
      reader.filled(piece);
      at += piece;
      remote::Token token;
      while (reader.next(&token)) (void)frame.take(token);
    }
  } catch (remote::ProtocolError const&) {
  }
}

void read_map(std::string const& bytes) {
  remote::Topology topology(3, 1000);
  try {
    topology.replace(bytes, *topology.node("127.0.0.1", 1));
    auto const map = topology.map();
    for (uint16_t const owner : map->owner_of)
      if (owner >= map->owners.size()) std::abort();
  } catch (remote::ProtocolError const&) {
  }
}

void read_endpoint(std::string const& text) {
  try {
    (void)remote::split_endpoint(text);
  } catch (std::invalid_argument const&) {
  }
}

struct Target {
  char const* name;
  std::vector<std::string> seeds;
  std::function<void(std::string const&)> run;
};

std::vector<Target> targets(fs::path const& folder) {
  std::string const manifest = read(folder / "manifest.json");
  std::string const map = "*1\r\n*4\r\n:0\r\n:16383\r\n*2\r\n$9\r\n127.0.0.1\r\n:7000\r\n*2\r\n$0\r\n\r\n:7001\r\n";
  std::string const values = "*3\r\n$8\r\nabcdefgh\r\n$-1\r\n$0\r\n\r\n-MOVED 1 a:1\r\n+OK\r\n:12\r\n";
  std::vector<Target> found = {
      {"json", {manifest, "[1,[2,{\"a\":null}]]", "{}"}, parse_json},
      {"tokens", {values, map}, read_tokens},
      {"map", {map}, read_map},
      {"endpoint", {"127.0.0.1:6379", "[::1]:1"}, read_endpoint},
  };
  for (auto const& entry : fs::recursive_directory_iterator(folder)) {
    if (!entry.is_regular_file()) continue;
    fs::path const path = entry.path();
    bool const is_manifest = path.extension() == ".json";
    // Of a shard, its length alone matters to the plugin; a permutation's header is read.
    if (!is_manifest && path.filename().string().find("row_of_id") == std::string::npos) continue;
    std::string const original = read(path);
    found.push_back({is_manifest ? "table, manifest" : "table, permutation", {original}, [=](std::string const& bytes) {
                       write(path, bytes);
                       find_table(folder.string(), std::string("items"));
                       write(path, original);
                     }});
  }
  return found;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) return std::fprintf(stderr, "usage: fuzz_native FOLDER SEED ROUNDS\n"), 2;
  setenv("HSTU_TRT_TABLES", arguments[1], 1);
  uint64_t const seed = std::strtoull(arguments[2], nullptr, 10), rounds = std::strtoull(arguments[3], nullptr, 10);
  for (Target const& target : targets(arguments[1])) {
    // What is right must be taken: else nothing behind the first check would be tried.
    for (std::string const& text : target.seeds) target.run(text);
    for (uint64_t round = 0; round < rounds; ++round) {
      state = seed + (round << 20);
      try {
        target.run(mutated(target.seeds[draw(target.seeds.size())]));
      } catch (...) {
        std::fprintf(stderr, "%s: an exception that nobody announced: seed %llu, round %llu\n", target.name,
                     static_cast<unsigned long long>(seed), static_cast<unsigned long long>(round));
        return 1;
      }
    }
    std::printf("%s: %llu\n", target.name, static_cast<unsigned long long>(rounds));
    std::fflush(stdout);
  }
}
