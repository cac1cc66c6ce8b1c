/*-------------------------------------------------------------------------
 *
 * mux.c
 *		Two ends of a cable (src/common/mux.h) under whatever may happen to them.
 *
 * The input is a list of what happens: streams open, send, stall and close, bytes
 * move in chunks of any size, either end is replaced by a new one, bytes are lost
 * with it, and strange ones come.  Every stream has an identity that its bytes are
 * made from, so that a byte that is lost, doubled or in the wrong stream is seen.
 * At last all that can move is moved, and both ends must agree.
 *
 * With libFuzzer: see test/fuzz/run.  With -DSTANDALONE: a program that invents inputs
 * from SEED on; test/t/140_mux.pl runs it.
 *
 *-------------------------------------------------------------------------
 */
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../src/common/mux.h"

#define QUEUE (512 * 1024)
#define MAX_MESSAGE 300000
#define UNKNOWN 0

/* never compiled away */
#define CHECK(condition)                                                                           \
	do                                                                                             \
	{                                                                                              \
		if (!(condition))                                                                          \
		{                                                                                          \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                        \
			abort();                                                                               \
		}                                                                                          \
	} while (0)

/* A stream as its owner has it. */
typedef struct Owned
{
	bool is_there;
	uint64_t identity; /* of the gateway's: UNKNOWN until its first bytes have come */
	uint64_t received;
	uint64_t sent;
	uint64_t to_send;
	bool is_stalled;
	bool ends; /* when all has been sent */
	int takes; /* at once, at most */
} Owned;

typedef struct End
{
	Mux *mux;
	bool is_guest;
	Owned streams[MUX_STREAMS];
	uint8_t queue[QUEUE]; /* on the way to this end */
	size_t queued;
	struct End *other;
	size_t messages[8]; /* lengths of those to be sent */
	int num_messages;
	uint8_t *going, *coming; /* NULL: none */
	size_t coming_len;
	uint64_t last_message; /* identity of the one that has come last */
} End;

static uint64_t progress; /* bytes taken */
static uint64_t counter;  /* identities and nonces */
static bool is_hostile
	[2]; /* strange bytes have come to the guest, to the gateway: what it hears is no longer checked */
static bool has_been_cut;
static bool is_directed; /* nothing is up to chance */

static uint8_t
byte_at(uint64_t identity, bool by_guest, uint64_t offset)
{
	uint64_t x;

	if (by_guest && offset < 8)
		return (uint8_t) (identity >> (8 * offset));
	x = (identity * 2 + by_guest) * 0x9e3779b97f4a7c15 + (offset / 3) * 0xbf58476d1ce4e5b9;
	x ^= x >> 29;
	/* many of those that have a meaning */
	return (x & 0x700) == 0		  ? PROTOCOL_CABLE_END
		   : (x & 0x700) == 0x100 ? PROTOCOL_CABLE_ESCAPE
								  : (uint8_t) x;
}

static bool
opened(void *arg, int stream)
{
	End *end = arg;
	Owned *owned = &end->streams[stream];

	CHECK(!end->is_guest && !owned->is_there);
	if (counter % 13 == 0 && !is_directed)
		return false;
	*owned = (Owned){.is_there = true, .takes = is_directed ? 1000000 : 1 << (counter % 15)};
	return true;
}

static size_t
deliver(void *arg, int stream, const uint8_t *bytes, size_t len)
{
	End *end = arg;
	Owned *owned = &end->streams[stream];
	size_t i;

	CHECK(owned->is_there && len > 0 && len <= PROTOCOL_CABLE_WINDOW);
	if (owned->is_stalled)
		return 0;
	if (len > (size_t) owned->takes)
		len = (size_t) owned->takes;
	progress += len;
	for (i = 0; i < len; i++, owned->received++)
	{
		if (!end->is_guest && owned->received < 8)
		{
			owned->identity |= (uint64_t) bytes[i] << (8 * owned->received);
			continue;
		}
		if (!is_hostile[!end->is_guest])
			CHECK(bytes[i] == byte_at(owned->identity, !end->is_guest, owned->received));
	}
	if (owned->identity % 7 == 6 && owned->received > 5000)
	{
		owned->is_there = false;
		return MUX_END;
	}
	return len;
}

static size_t
fetch(void *arg, int stream, uint8_t *bytes, size_t room)
{
	End *end = arg;
	Owned *owned = &end->streams[stream];
	size_t i;

	CHECK(owned->is_there && room > 0 && room <= PROTOCOL_CABLE_PAYLOAD);
	if (!end->is_guest && owned->received < 8)
		return 0;
	if (owned->sent == owned->to_send)
	{
		if (!owned->ends)
			return 0;
		owned->is_there = false;
		return MUX_END;
	}
	if (room > owned->to_send - owned->sent)
		room = owned->to_send - owned->sent;
	for (i = 0; i < room; i++)
		bytes[i] = byte_at(owned->identity, end->is_guest, owned->sent++);
	return room;
}

static void
closed(void *arg, int stream)
{
	End *end = arg;

	CHECK(end->streams[stream].is_there);
	end->streams[stream].is_there = false;
}

/* A message begins with its identity; those of one end come in order. */
static bool
next_message(void *arg, const uint8_t **bytes, size_t *len)
{
	End *end = arg;
	uint64_t identity;
	size_t i;

	CHECK(end->going == NULL);
	if (end->num_messages == 0)
		return false;
	*len = end->messages[--end->num_messages];
	*bytes = end->going = malloc(*len);
	identity = ++counter;
	for (i = 0; i < *len; i++)
		end->going[i] = i < 8 ? (uint8_t) (identity >> (8 * i)) : byte_at(identity, false, i);
	return true;
}

static void
message_sent(void *arg)
{
	End *end = arg;

	CHECK(end->going != NULL);
	free(end->going);
	end->going = NULL;
}

static uint8_t *
expect_message(void *arg, size_t len)
{
	End *end = arg;

	CHECK(end->coming == NULL && len > 0);
	if (len > MAX_MESSAGE || (counter % 11 == 0 && !is_directed))
		return NULL;
	end->coming_len = len;
	return end->coming = malloc(len);
}

static void
message_came(void *arg, bool is_whole)
{
	End *end = arg;
	uint64_t identity = 0;
	size_t i;

	CHECK(end->coming != NULL);
	for (i = 0; is_whole && i < end->coming_len && !is_hostile[!end->is_guest]; i++)
	{
		if (i < 8)
			identity |= (uint64_t) end->coming[i] << (8 * i);
		else
			CHECK(end->coming[i] == byte_at(identity, false, i));
	}
	CHECK(identity == 0 || identity > end->last_message);
	if (identity != 0)
		end->last_message = identity;
	free(end->coming);
	end->coming = NULL;
	progress++;
}

static void
restart(End *end)
{
	/* spread, so that no other number looks like it */
	mux_restart(end->mux, (++counter) * 0x9e3779b97f4a7c15);
}

static void
make(End *end)
{
	MuxEvents events = {end->is_guest ? NULL : opened,
						deliver,
						fetch,
						closed,
						expect_message,
						message_came,
						next_message,
						message_sent,
						end};

	memset(end->streams, 0, sizeof(end->streams));
	free(end->going);
	free(end->coming);
	end->going = end->coming = NULL;
	end->num_messages = 0;
	end->mux = mux_create(&events);
	restart(end);
}

/* So many of the bytes on their way arrive, in pieces of that size. */
static void
arrive(End *end, size_t len, size_t piece)
{
	size_t at = 0;

	if (len > end->queued)
		len = end->queued;
	while (at < len)
	{
		size_t n = piece < len - at ? piece : len - at;
		/* a copy of its own, so that a byte too many is noticed */
		uint8_t *bytes = malloc(n);
		const char *problem;

		uint8_t *place;
		size_t room = mux_room(end->mux, &place);

		if (room > 0 && counter % 2 == 0)
		{
			n = n < room ? n : room;
			memcpy(place, end->queue + at, n);
			mux_placed(end->mux, n);
			at += n;
			free(bytes);
			continue;
		}
		memcpy(bytes, end->queue + at, n);
		problem = mux_input(end->mux, bytes, n);
		free(bytes);
		at += n;
		if (problem != NULL)
		{
			if (!is_hostile[0] && !is_hostile[1] && !has_been_cut)
				fprintf(stderr, "%s\n", problem);
			CHECK(is_hostile[0] || is_hostile[1] || has_been_cut);
			restart(end);
		}
	}
	memmove(end->queue, end->queue + at, end->queued - at);
	end->queued -= at;
}

/* Bytes of a message that are to leave as they are; false when some have to wait. */
static bool
leave_plain(End *end, size_t *sum)
{
	size_t left = QUEUE - end->other->queued;
	size_t len;
	const uint8_t *plain = mux_plain(end->mux, &len);
	size_t n = len < left ? len : left;

	if (n > 0)
	{
		memcpy(end->other->queue + end->other->queued, plain, n);
		end->other->queued += n;
		mux_plain_sent(end->mux, n);
	}
	*sum += n;
	return n == len;
}

static size_t
leave(End *end, size_t room)
{
	static uint8_t bytes[PROTOCOL_CABLE_PIECE + 20000];
	size_t left;
	size_t n, plain = 0;

	if (!leave_plain(end, &plain))
		return plain;
	left = QUEUE - end->other->queued;
	if (room > left)
		room = left;
	if (room > sizeof(bytes))
		room = sizeof(bytes);
	if (room < MUX_MIN_ROOM)
		return plain;
	n = mux_output(end->mux, bytes, room);
	CHECK(n <= room);
	memcpy(end->other->queue + end->other->queued, bytes, n);
	end->other->queued += n;
	(void) leave_plain(end, &plain);
	return n + plain;
}

/* Everything moves that can. */
static void
run_dry(End *guest, End *gateway)
{
	size_t moved;

	do
	{
		uint64_t before = progress;
		int i;

		for (i = 0; i < MUX_STREAMS; i++)
		{
			guest->streams[i].is_stalled = gateway->streams[i].is_stalled = false;
			mux_ready(guest->mux, i);
			mux_ready(gateway->mux, i);
			mux_resume(guest->mux, i);
			mux_resume(gateway->mux, i);
		}
		moved = leave(guest, QUEUE) + leave(gateway, QUEUE) + (size_t) (progress - before);
		moved += guest->queued + gateway->queued;
		arrive(guest, QUEUE, QUEUE);
		arrive(gateway, QUEUE, QUEUE);
	} while (moved > 0);
}

static void
check_agreement(End *guest, End *gateway)
{
	int i;

	CHECK(mux_is_synced(guest->mux) && mux_is_synced(gateway->mux));
	for (i = 0; i < MUX_STREAMS; i++)
	{
		Owned *a = &guest->streams[i], *b = &gateway->streams[i];

		CHECK(a->is_there == b->is_there);
		if (!a->is_there)
			continue;
		CHECK(a->sent == a->to_send && a->sent == b->received);
		CHECK(b->sent == a->received && (b->received < 8 || b->sent == b->to_send));
	}
}

/* A frame of these bytes, and then so many others, is on its way to this end. */
static void
put_frame(End *end, int kind, int number, const uint8_t *bytes, size_t len, size_t more)
{
	uint8_t *at = end->queue + end->queued;
	size_t i;

	*at++ = PROTOCOL_CABLE_END;
	*at++ = (uint8_t) kind;
	*at++ = (uint8_t) number;
	for (i = 0; i < len; i++)
	{
		if (bytes[i] == PROTOCOL_CABLE_END || bytes[i] == PROTOCOL_CABLE_ESCAPE)
			*at++ = PROTOCOL_CABLE_ESCAPE;
		*at++ = bytes[i] == PROTOCOL_CABLE_END		? PROTOCOL_CABLE_IS_END
				: bytes[i] == PROTOCOL_CABLE_ESCAPE ? PROTOCOL_CABLE_IS_ESCAPE
													: bytes[i];
	}
	for (i = 0; i < more && i < PROTOCOL_CABLE_PAYLOAD - len; i++)
		*at++ = 'x';
	*at++ = PROTOCOL_CABLE_END;
	end->queued = (size_t) (at - end->queue);
}

extern int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static End ends[2];
	End *guest = &ends[0], *gateway = &ends[1];
	size_t at = 0;
	int i;

	counter = 1;
	is_hostile[0] = is_hostile[1] = has_been_cut = false;
	guest->queued = gateway->queued = 0;
	guest->last_message = gateway->last_message = 0;
	guest->is_guest = true;
	guest->other = gateway;
	gateway->other = guest;
	make(guest);
	make(gateway);

	while (at + 4 <= size)
	{
		End *end = &ends[data[at] & 1];
		int what = data[at] >> 1 & 15;
		int stream = data[at + 1] % MUX_STREAMS;
		size_t amount = (size_t) (data[at + 2] << 8 | data[at + 3]);
		Owned *owned = &end->streams[stream];

		at += 4;
		counter++;
		switch (what)
		{
			case 0:
				stream = mux_open(guest->mux);
				if (stream >= 0)
					guest->streams[stream] = (Owned){.is_there = true,
													 .identity = ++counter << 20 | 1,
													 .takes = (int) amount + 1};
				if (stream >= 0)
					guest->streams[stream].to_send = 8 + (amount >> (amount & 15));
				if (stream >= 0)
					mux_ready(guest->mux, stream);
				break;
			case 2: /* a message */
				if (end->num_messages < 8)
					end->messages[end->num_messages++] = 9 + (amount >> (amount & 15));
				break;
			case 1:
				owned->to_send += owned->is_there ? amount >> (amount & 15) : 0;
				mux_ready(end->mux, stream);
				break;
			case 3:
				owned->ends = true;
				mux_ready(end->mux, stream);
				break;
			case 4:
				if (owned->is_there)
					mux_close(end->mux, stream);
				owned->is_there = false;
				break;
			case 5:
				owned->is_stalled = true;
				break;
			case 6:
				owned->is_stalled = false;
				mux_resume(end->mux, stream);
				break;
			case 7:
			case 8:
				arrive(end, amount, data[at - 3] + 1);
				break;
			case 9:
			case 10:
			case 11:
				(void) leave(end, amount % 20000);
				break;
			case 12: /* its process is replaced; what is on the way to it may have gone as well, all or its beginning */
				mux_free(end->mux);
				if (amount & 1)
				{
					size_t gone = amount % (end->queued + 1);

					memmove(end->queue, end->queue + gone, end->queued - gone);
					end->queued -= gone;
				}
				if (amount & 2) /* as may the end of what it has sent */
					end->other->queued -= amount % (end->other->queued + 1);
				has_been_cut = has_been_cut || (amount & 3);
				make(end);
				break;
			case 13: /* it begins anew by itself */
				restart(end);
				break;
			case 14: /* strange bytes, or a whole frame */
				if (amount & 64 && at + 2 < size && end->queued + 9000 < QUEUE)
				{
					put_frame(end, 1 + data[at] % 6, stream, data + at + 1,
							  size - at - 1 < amount % 64 ? size - at - 1 : amount % 64,
							  (amount >> 7) * 8);
					is_hostile[!end->is_guest] = true;
					break;
				}
				while (amount % 64 > 0 && at < size && end->queued < QUEUE)
				{
					end->queue[end->queued++] = data[at++];
					amount--;
					is_hostile[!end->is_guest] = true;
				}
				break;
			default: /* both directions for a while */
				for (i = 0; i < 4; i++)
				{
					(void) leave(guest, QUEUE);
					(void) leave(gateway, QUEUE);
					arrive(guest, QUEUE, amount + 1);
					arrive(gateway, QUEUE, amount + 1);
				}
		}
	}

	/* whatever has been, two new ends understand each other */
	if (is_hostile[0] || is_hostile[1] || has_been_cut)
	{
		restart(guest);
		restart(gateway);
		run_dry(guest, gateway);
		for (i = 0; i < MUX_STREAMS; i++)
			CHECK(guest->streams[i].is_there == gateway->streams[i].is_there);
	}
	else
	{
		run_dry(guest, gateway);
		check_agreement(guest, gateway);
	}
	for (i = 0; i < MUX_STREAMS; i++)
	{
		if (guest->streams[i].is_there)
			mux_close(guest->mux, i);
		guest->streams[i].is_there = false;
	}
	run_dry(guest, gateway);
	CHECK(mux_streams(guest->mux) == 0 && mux_streams(gateway->mux) == 0);
	is_hostile[0] = is_hostile[1] = false;
	counter |= 1 << 30;
	for (i = 0; i < 2; i++)
	{
		uint64_t before = ends[!i].last_message;

		counter += counter % 11 == 10 ? 2 : 0; /* not to be refused */
		ends[i].messages[ends[i].num_messages++] = 140000;
		run_dry(guest, gateway);
		CHECK(ends[!i].last_message > before && ends[i].going == NULL);
	}
	for (i = 0; i < MUX_STREAMS; i++)
	{
		int stream = mux_open(guest->mux);

		CHECK(stream >= 0); /* all numbers are free again */
		counter += counter % 13 == 0;
		guest->streams[stream] = (Owned){
			.is_there = true, .identity = ++counter << 20 | 1, .takes = 1000, .to_send = 100};
	}
	CHECK(mux_open(guest->mux) == -1);
	counter += counter % 13 == 0;
	run_dry(guest, gateway);
	check_agreement(guest, gateway);
	mux_free(guest->mux);
	mux_free(gateway->mux);
	CHECK(guest->coming == NULL && gateway->coming == NULL);
	return 0;
}

#ifdef STANDALONE
static End guest_end, gateway_end;

static void
begin(void)
{
	counter = 1;
	is_hostile[0] = is_hostile[1] = has_been_cut = false;
	guest_end.is_guest = true;
	guest_end.other = &gateway_end;
	gateway_end.other = &guest_end;
	guest_end.queued = gateway_end.queued = 0;
	make(&guest_end);
	make(&gateway_end);
}

static void
finish(void)
{
	mux_free(guest_end.mux);
	mux_free(gateway_end.mux);
}

/* A stream of the guest with so much to send. */
static Owned *
open_stream(uint64_t to_send)
{
	int stream = mux_open(guest_end.mux);

	CHECK(stream >= 0);
	guest_end.streams[stream] = (Owned){.is_there = true,
										.identity = (uint64_t) stream << 20 | 1,
										.takes = 1000000,
										.to_send = to_send};
	mux_ready(guest_end.mux, stream);
	return &guest_end.streams[stream];
}

/* Both ends get and send what there is, some times; nobody resumes what is stalled. */
static void
exchange(int times)
{
	while (times-- > 0)
	{
		int i;

		(void) leave(&guest_end, sizeof(guest_end.queue));
		(void) leave(&gateway_end, sizeof(gateway_end.queue));
		arrive(&guest_end, QUEUE, QUEUE);
		arrive(&gateway_end, QUEUE, QUEUE);
		for (i = 0; i < MUX_STREAMS; i++)
			mux_ready(gateway_end.mux, i);
	}
}

static void
check_waiting_survives(void)
{
	Owned *owned;

	begin();
	owned = open_stream(1000);
	restart(&guest_end);
	restart(&gateway_end);
	CHECK(owned->is_there && !mux_is_open(guest_end.mux, 0)); /* nobody has heard of it */
	exchange(5);
	CHECK(owned->is_there && mux_is_open(guest_end.mux, 0) && owned->sent == 1000);
	restart(&guest_end);
	CHECK(!owned->is_there);
	finish();
}

static void
check_close_is_last(void)
{
	Owned *owned;

	begin();
	owned = open_stream(0);
	exchange(5);
	gateway_end.streams[0].is_stalled = true;
	owned->to_send = 10000;
	owned->ends = true;
	mux_ready(guest_end.mux, 0);
	exchange(5);
	CHECK(!owned->is_there && owned->sent == 10000); /* it has said all, and closed */
	CHECK(gateway_end.streams[0].is_there && gateway_end.streams[0].received == 0);
	gateway_end.streams[0].is_stalled = false;
	gateway_end.streams[0].takes = 6000;
	mux_resume(gateway_end.mux, 0);
	CHECK(gateway_end.streams[0].is_there && gateway_end.streams[0].received == 6000);
	mux_resume(gateway_end.mux, 0);
	CHECK(!gateway_end.streams[0].is_there && gateway_end.streams[0].received == 10000);
	finish();
}

static void
check_slow_stream(void)
{
	Owned *slow, *other;

	begin();
	slow = open_stream(8);
	other = open_stream(8);
	exchange(5);
	gateway_end.streams[0].is_stalled = true;
	slow->to_send = other->to_send = 1000000;
	mux_ready(guest_end.mux, 0);
	mux_ready(guest_end.mux, 1);
	exchange(300);
	CHECK(other->sent == 1000000 && gateway_end.streams[1].received == 1000000);
	CHECK(slow->sent == PROTOCOL_CABLE_WINDOW && gateway_end.streams[0].received == 8);
	finish();
}

/* What an end that knows the other one says to this. */
static const char *
said(End *end, int kind, int number, const uint8_t *bytes, size_t len, size_t more, int times)
{
	const char *problem = NULL;

	begin();
	(void) open_stream(100);
	exchange(5);
	CHECK(mux_is_open(guest_end.mux, 0) && gateway_end.streams[0].received == 100);
	end->streams[0].is_stalled = true;
	while (times-- > 0 && problem == NULL)
	{
		end->queued = 0;
		put_frame(end, kind, number, bytes, len, more);
		problem = mux_input(end->mux, end->queue, end->queued);
	}
	finish();
	return problem;
}

static void
check_nonsense(void)
{
	const uint8_t greeting[24] = PROTOCOL_CABLE_MAGIC; /* and zeros */
	const uint8_t zeros[16] = {0}, one[4] = {0, 0, 0, 1}, much[4] = {0, 4, 0, 1};
	const int whole = PROTOCOL_CABLE_WINDOW / 4096;
	End *guest = &guest_end, *gateway = &gateway_end;

	CHECK(said(gateway, PROTOCOL_CABLE_DATA, 0, NULL, 0, 1000, 1) == NULL);
	CHECK(said(gateway, PROTOCOL_CABLE_DATA, 0, NULL, 0, 4096, whole) != NULL); /* 100 are gone */
	CHECK(said(gateway, PROTOCOL_CABLE_DATA, 0, NULL, 0, 4096, whole - 1) == NULL);
	CHECK(said(guest, PROTOCOL_CABLE_DATA, 0, NULL, 0, 4096, whole) == NULL);
	CHECK(said(guest, PROTOCOL_CABLE_DATA, 0, NULL, 0, 4096, whole + 1) != NULL);
	CHECK(said(gateway, PROTOCOL_CABLE_DATA, 0, NULL, 0, 0, 1) != NULL);
	CHECK(said(gateway, PROTOCOL_CABLE_DATA, 1, NULL, 0, 1, 1) != NULL); /* not open */
	CHECK(said(gateway, PROTOCOL_CABLE_DATA, 16, NULL, 0, 1, 1) != NULL);
	CHECK(said(gateway, PROTOCOL_CABLE_DATA, 255, NULL, 0, 1, 1) != NULL);
	CHECK(said(guest, PROTOCOL_CABLE_CREDIT, 0, one, 4, 0, 1) == NULL);
	CHECK(said(guest, PROTOCOL_CABLE_CREDIT, 0, one, 4, 0, 101) != NULL); /* more than was used */
	CHECK(said(gateway, PROTOCOL_CABLE_CREDIT, 0, one, 4, 0, 1) != NULL);
	CHECK(said(guest, PROTOCOL_CABLE_CREDIT, 0, much, 4, 0, 1) != NULL);
	CHECK(said(guest, PROTOCOL_CABLE_CREDIT, 0, zeros, 4, 0, 1) != NULL);
	CHECK(said(guest, PROTOCOL_CABLE_CREDIT, 0, one, 3, 0, 1) != NULL);
	CHECK(said(gateway, PROTOCOL_CABLE_OPEN, 0, NULL, 0, 0, 1) != NULL); /* it is open */
	CHECK(said(gateway, PROTOCOL_CABLE_OPEN, 1, NULL, 0, 0, 1) == NULL);
	CHECK(said(gateway, PROTOCOL_CABLE_OPEN, 1, NULL, 0, 1, 1) != NULL);
	CHECK(said(guest, PROTOCOL_CABLE_OPEN, 1, NULL, 0, 0, 1) != NULL); /* not the gateway's to do */
	CHECK(said(gateway, PROTOCOL_CABLE_CLOSE, 0, NULL, 0, 1, 1) != NULL);
	CHECK(said(gateway, PROTOCOL_CABLE_CLOSE, 0, NULL, 0, 0, 1) == NULL);
	CHECK(said(gateway, PROTOCOL_CABLE_CLOSE, 0, NULL, 0, 0, 2) != NULL);
	CHECK(said(gateway, 7, 0, NULL, 0, 0, 1) != NULL);
	CHECK(said(gateway, PROTOCOL_CABLE_HELLO, PROTOCOL_CABLE_VERSION, greeting, 24, 0, 1) != NULL);
	CHECK(said(gateway, PROTOCOL_CABLE_HELLO, PROTOCOL_CABLE_VERSION + 1, greeting, 16, 8, 1) !=
		  NULL);
	CHECK(said(gateway, PROTOCOL_CABLE_HELLO, PROTOCOL_CABLE_VERSION, greeting, 16, 7, 1) != NULL);
	CHECK(said(gateway, PROTOCOL_CABLE_HELLO, PROTOCOL_CABLE_VERSION, zeros, 8, 16, 1) != NULL);
	CHECK(said(gateway, PROTOCOL_CABLE_HELLO, PROTOCOL_CABLE_VERSION, greeting, 8, 16, 1) ==
		  NULL); /* it begins anew */
}

int
main(int argc, char **argv)
{
	unsigned seed = argc > 1 ? (unsigned) atoi(argv[1]) : 1;
	int rounds = argc > 2 ? atoi(argv[2]) : 1000;
	int i;

	is_directed = true;
	check_waiting_survives();
	check_close_is_last();
	check_slow_stream();
	check_nonsense();
	is_directed = false;
	for (i = 0; i < rounds; i++)
	{
		uint8_t data[2048];
		size_t size, n;

		srandom(seed + (unsigned) i);
		size = (size_t) random() % sizeof(data);
		for (n = 0; n < size; n++)
			data[n] = (uint8_t) (random() >> 8);
		/* most often nothing strange happens */
		for (n = 0; n + 4 <= size && i % 4 != 0; n += 4)
		{
			if ((data[n] >> 1 & 15) == 14 || (i % 4 == 1 && (data[n] >> 1 & 15) == 12))
				data[n] = 15 << 1;
		}
		(void) LLVMFuzzerTestOneInput(data, size);
	}
	printf("%d rounds from seed %u\n", rounds, seed);
	return 0;
}
#endif
