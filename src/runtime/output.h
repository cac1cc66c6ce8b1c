/*-------------------------------------------------------------------------
 *
 * output.h
 *		What a command has said on one of its streams: the first of it and the last.
 *
 * Offsets count the bytes of the whole stream.  What is kept is its head, from 0 on,
 * and its tail, up to the end; what is between is lost.  Memory is taken as bytes
 * come.
 *
 *-------------------------------------------------------------------------
 */
#ifndef RUNTIME_OUTPUT_H
#define RUNTIME_OUTPUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define OUTPUT_CHUNK (64 * 1024)	   /* the most that is added at once */
#define OUTPUT_ROOM (4 * OUTPUT_CHUNK) /* more memory than that takes */

typedef struct Chunk Chunk;

typedef struct ChunkList
{
	Chunk *first;
	Chunk *last;
	size_t len; /* bytes in all of them */
	size_t max;
} ChunkList;

/* Zeroed it is one that keeps nothing. */
typedef struct Output
{
	int64_t total; /* bytes that have been said */
	ChunkList head;
	ChunkList tail;
	bool head_is_whole; /* nothing is added to it any more */
} Output;

/* Memory of all outputs together, in bytes */
extern size_t output_memory(void);

/* Begin one that keeps so many bytes. */
extern void output_init(Output *output, int64_t max);

/*
 * Add bytes, at most OUTPUT_CHUNK of them; those for which there is no place, or no
 * memory, are lost.
 */
extern void output_append(Output *output, const char *bytes, size_t len);

/* Let so many bytes pass that are not kept, nor what the tail had. */
extern void output_lose(Output *output, size_t len);

/* Let go of some of it, the tail first; false: there is nothing left. */
extern bool output_shrink(Output *output);

/* Let go of all of it; the total stays. */
extern void output_drop(Output *output);

/* No more will come: give back memory that is not needed. */
extern void output_trim(Output *output);

/* How many of its bytes are kept, and how many are not */
extern size_t output_kept(const Output *output);
extern int64_t output_lost(const Output *output);

/*
 * What can be read from an offset on: *from becomes the first offset from there that
 * is kept, or the total; returns how many bytes there are in one piece, at most "max".
 */
extern size_t output_find(const Output *output, int64_t *from, size_t max);

/* Copy what output_find() has found. */
extern void output_copy(const Output *output, int64_t from, char *bytes, size_t len);

#endif /* RUNTIME_OUTPUT_H */
