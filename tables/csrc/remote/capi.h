// SPDX-License-Identifier: Apache-2.0
// The C face of libhstu_trt_remote.so. Threads may share a client and its tables.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HSTU_TRT_REMOTE_ABI 1

// A row's status after a read or write.
enum {
  HSTU_TRT_ROW_FOUND = 2,        // read or written
  HSTU_TRT_ROW_MISSING = 3,      // the cluster holds no such row
  HSTU_TRT_ROW_UNAVAILABLE = 5,  // no node that serves it answered in time
  HSTU_TRT_ROW_SKIPPED = 6,      // its number is negative: a row of zeros, nobody was asked
  HSTU_TRT_ROW_REFUSED = 7,      // the value has another length, or the node refused the command
};

typedef struct HstuTrtRemoteClient HstuTrtRemoteClient;
typedef struct HstuTrtRemoteTable HstuTrtRemoteTable;

typedef struct {
  char const* seeds;     // "host:port,host:port": any nodes of the cluster
  char const* user;      // null: Redis' default user
  char const* password;  // null: no AUTH
  int32_t tls;           // 0: plain TCP, and OpenSSL is not loaded
  char const* tls_authorities;
  char const* tls_certificate;
  char const* tls_key;
  int32_t breaker_failures;  // failures in a row that open a node's breaker
  int64_t breaker_open_us;
  int32_t rows_per_command;
  int32_t replica_reads;
} HstuTrtRemoteOptions;

typedef struct {
  HstuTrtRemoteTable const* table;
  int64_t const* rows;  // [count]
  int64_t count;
  uint8_t* values;  // [count] of row_bytes each, `stride` bytes apart: written by read, read by write
  int64_t stride;
  uint8_t* status;  // [count]
} HstuTrtRemoteJob;

// Called with the bytes of a reply, once.
typedef void (*HstuTrtRemoteReply)(char const* bytes, size_t size, void* context);

#pragma GCC visibility push(default)

// Functions that take `error` write a sentence there, cut to `room` bytes; "" if there is nothing to tell.

int32_t hstu_trt_remote_abi(void);
// Connects and reads the slot map within the deadline; null on failure.
HstuTrtRemoteClient* hstu_trt_remote_open(HstuTrtRemoteOptions const* options, int64_t deadline_us, char* error,
                                          size_t room);
void hstu_trt_remote_close(HstuTrtRemoteClient* client);

// partitions: a power of two; row_bytes: 1 to 1 MiB. Null if they are not.
HstuTrtRemoteTable* hstu_trt_remote_table(char const* prefix, uint32_t partitions, uint32_t row_bytes);
void hstu_trt_remote_table_free(HstuTrtRemoteTable* table);

// Return 0 if the status of every row is told; then `error` may name the first thing that went wrong. Duplicate rows of
// a job are asked for once. Rows that are not found are zeros. A write takes distinct rows.
int32_t hstu_trt_remote_read(HstuTrtRemoteClient* client, HstuTrtRemoteJob const* jobs, int32_t count,
                             int64_t deadline_us, char* error, size_t room);
int32_t hstu_trt_remote_write(HstuTrtRemoteClient* client, HstuTrtRemoteJob const* job, int64_t deadline_us,
                              char* error, size_t room);

// Any command, to the master of its second part as a key, or to the node "host:port". Returns 0 and calls `reply` with
// RESP bytes, errors among them; anything else if no node answered.
int32_t hstu_trt_remote_execute(HstuTrtRemoteClient* client, char const* node, int32_t parts, char const* const* part,
                                size_t const* sizes, int64_t deadline_us, HstuTrtRemoteReply reply, void* context,
                                char* error, size_t room);

// The nodes known, a line each: "host:port open|closed".
int32_t hstu_trt_remote_nodes(HstuTrtRemoteClient* client, HstuTrtRemoteReply reply, void* context);
// Names of the counters, "," between them, and their values in this order.
char const* hstu_trt_remote_counter_names(void);
void hstu_trt_remote_counters(HstuTrtRemoteClient* client, uint64_t* values);

uint32_t hstu_trt_remote_partition(HstuTrtRemoteTable const* table, int64_t row);
int32_t hstu_trt_remote_slot(char const* key, size_t size);

#ifdef __cplusplus
}
#endif
