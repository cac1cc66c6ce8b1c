/*-------------------------------------------------------------------------
 *
 * output.c
 *		What a command has said on one of its streams: the first of it and the last.
 *
 *-------------------------------------------------------------------------
 */
#include "output.h"

#include <stdlib.h>
#include <string.h>

#define SMALLEST 1024				/* most commands say little */
#define LARGEST (OUTPUT_CHUNK - 32) /* with malloc's own words it is as many pages */

struct Chunk
{
	Chunk *next;
	uint32_t room;
	uint32_t begin; /* bytes before are not needed any more */
	uint32_t end;
	char bytes[];
};

#define CHUNK_SIZE(chunk) (sizeof(Chunk) + (chunk)->room)

static size_t memory;

size_t
output_memory(void)
{
	return memory;
}

static Chunk *
add_chunk(ChunkList *list)
{
	size_t size = list->last == NULL ? SMALLEST : CHUNK_SIZE(list->last) * 2;
	Chunk *chunk;

	if (size > LARGEST)
		size = LARGEST;
	chunk = malloc(size);
	if (chunk == NULL)
		return NULL;
	memory += size;
	chunk->next = NULL;
	chunk->room = (uint32_t) (size - sizeof(Chunk));
	chunk->begin = chunk->end = 0;
	if (list->last != NULL)
		list->last->next = chunk;
	else
		list->first = chunk;
	list->last = chunk;
	return chunk;
}

/* Take the first chunk away. */
static void
drop_first(ChunkList *list)
{
	Chunk *chunk = list->first;

	list->first = chunk->next;
	if (list->first == NULL)
		list->last = NULL;
	list->len -= chunk->end - chunk->begin;
	memory -= CHUNK_SIZE(chunk);
	free(chunk);
}

static void
drop_last(ChunkList *list)
{
	Chunk **at = &list->first;
	Chunk *before = NULL;

	while ((*at)->next != NULL)
	{
		before = *at;
		at = &before->next;
	}
	list->len -= (*at)->end - (*at)->begin;
	memory -= CHUNK_SIZE(*at);
	free(*at);
	*at = NULL;
	list->last = before;
}

/* Take so many bytes away from the front. */
static void
cut(ChunkList *list, size_t len)
{
	while (len > 0 && list->first != NULL)
	{
		size_t has = list->first->end - list->first->begin;

		if (has > len)
		{
			list->first->begin += (uint32_t) len;
			list->len -= len;
			return;
		}
		len -= has;
		drop_first(list);
	}
}

/* Add bytes at the end; returns how many there was memory for. */
static size_t
add(ChunkList *list, const char *bytes, size_t len)
{
	size_t done = 0;

	while (done < len)
	{
		Chunk *chunk = list->last;
		size_t n;

		if ((chunk == NULL || chunk->end == chunk->room) && (chunk = add_chunk(list)) == NULL)
			break;
		n = chunk->room - chunk->end < len - done ? chunk->room - chunk->end : len - done;
		memcpy(chunk->bytes + chunk->end, bytes + done, n);
		chunk->end += (uint32_t) n;
		list->len += n;
		done += n;
	}
	return done;
}

void
output_init(Output *output, int64_t max)
{
	memset(output, 0, sizeof(*output));
	output->head.max = (size_t) max / 2;
	output->tail.max = (size_t) max - output->head.max;
}

void
output_append(Output *output, const char *bytes, size_t len)
{
	size_t n;

	if (!output->head_is_whole)
	{
		size_t room = output->head.max - output->head.len;

		n = add(&output->head, bytes, len < room ? len : room);
		output->head_is_whole = n < len;
		output->total += (int64_t) n;
		bytes += n;
		len -= n;
	}
	if (len > output->tail.max)
	{
		output_lose(output, len - output->tail.max);
		bytes += len - output->tail.max;
		len = output->tail.max;
	}
	if (output->tail.len + len > output->tail.max)
		cut(&output->tail, output->tail.len + len - output->tail.max);
	n = add(&output->tail, bytes, len);
	output->total += (int64_t) n;
	/* the tail has no gaps: what there is no memory for takes with it what precedes */
	if (n < len)
		output_lose(output, len - n);
}

void
output_lose(Output *output, size_t len)
{
	output->head_is_whole = output->head_is_whole || len > 0;
	output->total += (int64_t) len;
	cut(&output->tail, output->tail.len);
}

bool
output_shrink(Output *output)
{
	if (output->tail.first != NULL)
		drop_first(&output->tail);
	else if (output->head.first != NULL)
	{
		output->head_is_whole = true;
		drop_last(&output->head);
	}
	else
		return false;
	return true;
}

void
output_drop(Output *output)
{
	while (output_shrink(output))
		;
}

/* realloc() may move a chunk: whoever points to it is told */
static void
trim(ChunkList *list)
{
	Chunk **at = &list->first;
	Chunk *chunk;

	if (list->last == NULL || list->last->end == list->last->room)
		return;
	while ((*at)->next != NULL)
		at = &(*at)->next;
	chunk = realloc(*at, sizeof(Chunk) + (*at)->end);
	if (chunk == NULL)
		return;
	memory -= chunk->room - chunk->end;
	chunk->room = chunk->end;
	*at = list->last = chunk;
}

void
output_trim(Output *output)
{
	trim(&output->head);
	trim(&output->tail);
}

size_t
output_kept(const Output *output)
{
	return output->head.len + output->tail.len;
}

int64_t
output_lost(const Output *output)
{
	return output->total - (int64_t) output_kept(output);
}

size_t
output_find(const Output *output, int64_t *from, size_t max)
{
	int64_t tail_from = output->total - (int64_t) output->tail.len;
	int64_t end = output->total;

	if (*from < (int64_t) output->head.len)
		end = output_lost(output) > 0 ? (int64_t) output->head.len : output->total;
	else if (*from < tail_from)
		*from = tail_from;
	else if (*from > output->total)
		*from = output->total;
	return (uint64_t) (end - *from) < max ? (size_t) (end - *from) : max;
}

static size_t
copy(const ChunkList *list, size_t skip, char *bytes, size_t len)
{
	const Chunk *chunk;
	size_t done = 0;

	for (chunk = list->first; chunk != NULL && done < len; chunk = chunk->next)
	{
		size_t has = chunk->end - chunk->begin;
		size_t n;

		if (skip >= has)
		{
			skip -= has;
			continue;
		}
		n = has - skip < len - done ? has - skip : len - done;
		memcpy(bytes + done, chunk->bytes + chunk->begin + skip, n);
		done += n;
		skip = 0;
	}
	return done;
}

void
output_copy(const Output *output, int64_t from, char *bytes, size_t len)
{
	int64_t tail_from = output->total - (int64_t) output->tail.len;
	size_t done = 0;

	if (from < (int64_t) output->head.len)
		done = copy(&output->head, (size_t) from, bytes, len);
	if (done < len)
		(void) copy(&output->tail, (size_t) (from + (int64_t) done - tail_from), bytes + done,
					len - done);
}
