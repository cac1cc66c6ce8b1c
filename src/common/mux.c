/*-------------------------------------------------------------------------
 *
 * mux.c
 *		Byte streams over one cable, which loses its place now and then.
 *
 *-------------------------------------------------------------------------
 */
#include "mux.h"

#include <stdlib.h>
#include <string.h>

#define WINDOW PROTOCOL_CABLE_WINDOW
#define PAYLOAD PROTOCOL_CABLE_PAYLOAD
#define HEAD 2 /* kind and number */
#define MAGIC_LEN 8
#define HELLO_LEN (HEAD + MAGIC_LEN + 16)
#define ENCODED(len) (2 * (len) + 1) /* at most */
#define PIECE PROTOCOL_CABLE_PIECE
#define PIECE_HEAD 8 /* kind, two numbers */
#define NONCE 8

typedef enum StreamState
{
	STREAM_FREE,
	STREAM_OPENING, /* to be opened by us; the other end does not know */
	STREAM_OPEN
} StreamState;

typedef struct Stream
{
	StreamState state;
	bool has_owner;
	bool is_ready;	/* there may be bytes to fetch */
	bool close_due; /* to be sent */
	bool close_sent;
	bool close_received;
	uint32_t credit;  /* bytes that we may send */
	uint32_t granted; /* bytes that the other end may send */
	uint32_t taken;	  /* bytes for which it gets new credit */
	uint8_t *kept;	  /* bytes that the owner did not take; NULL: none */
	size_t kept_at;
	size_t kept_len;
} Stream;

struct Mux
{
	MuxEvents events;
	uint64_t own, peer; /* nonces; peer 0: never heard */
	bool hello_due;
	bool synced;
	bool told_peer; /* the HELLO last sent had the peer's nonce */
	Stream streams[MUX_STREAMS];
	int next; /* whose turn it is to send */
	uint64_t frames;

	uint8_t frame[HEAD + PAYLOAD]; /* being decoded */
	size_t frame_len;
	bool is_escaped;
	bool is_broken; /* too long, or wrongly escaped */

	uint8_t *in;		  /* message that comes, if somebody takes it */
	size_t in_at, in_len; /* 0: none comes */
	size_t piece_left;	  /* bytes of a piece that are still to come, */
	size_t check_left;	  /* and of the nonce after it */
	uint8_t check[NONCE];

	size_t fill_left; /* ENDs to be sent before anything else */
	bool check_due;
	bool piece_missed;	/* there was no room for one */
	const uint8_t *out; /* message that goes; NULL: none */
	size_t out_left;
	size_t plain_left; /* of the piece that goes */
};

Mux *
mux_create(const MuxEvents *events)
{
	Mux *mux = calloc(1, sizeof(Mux));

	mux->events = *events;
	return mux;
}

void
mux_free(Mux *mux)
{
	int i;

	for (i = 0; i < MUX_STREAMS; i++)
		free(mux->streams[i].kept);
	free(mux);
}

static void
forget_stream(Stream *stream)
{
	free(stream->kept);
	memset(stream, 0, sizeof(*stream));
}

/* It has ended for its owner, who knows. */
static void
let_go(Stream *stream)
{
	free(stream->kept);
	stream->kept = NULL;
	stream->kept_len = 0;
	stream->has_owner = false;
	stream->is_ready = false;
	if (stream->state == STREAM_OPENING)
		forget_stream(stream);
	else
		stream->close_due = !stream->close_sent;
}

/* What is under way will not arrive. */
static void
drop_messages(Mux *mux)
{
	bool had_in = mux->in != NULL;
	bool had_out = mux->out != NULL;

	mux->in = NULL;
	mux->in_len = mux->piece_left = mux->check_left = 0;
	mux->out = NULL;
	mux->out_left = mux->plain_left = 0;
	mux->check_due = mux->piece_missed = false;
	if (had_in)
		mux->events.message(mux->events.arg, false);
	if (had_out)
		mux->events.sent(mux->events.arg);
}

static void
drop_streams(Mux *mux)
{
	int i;

	drop_messages(mux);
	for (i = 0; i < MUX_STREAMS; i++)
	{
		Stream *stream = &mux->streams[i];
		bool had_owner = stream->has_owner;

		if (stream->state != STREAM_OPEN)
			continue;
		forget_stream(stream);
		if (had_owner)
			mux->events.closed(mux->events.arg, i);
	}
}

void
mux_restart(Mux *mux, uint64_t nonce)
{
	mux->own = nonce;
	mux->peer = 0;
	mux->synced = false;
	mux->told_peer = false;
	mux->hello_due = true;
	mux->frame_len = 0;
	mux->is_escaped = mux->is_broken = false;
	mux->fill_left = PIECE + NONCE;
	drop_streams(mux);
}

bool
mux_is_synced(const Mux *mux)
{
	return mux->synced;
}

int
mux_streams(const Mux *mux)
{
	int i, count = 0;

	for (i = 0; i < MUX_STREAMS; i++)
		count += mux->streams[i].has_owner;
	return count;
}

uint64_t
mux_frames(const Mux *mux)
{
	return mux->frames;
}

/* ---- what comes ---- */

/* A number of so many digits, each of a byte's lower bits. */
static uint64_t
get_number(const uint8_t *bytes, int len, int bits)
{
	uint64_t number = 0;

	while (len-- > 0)
		number = number << bits | *bytes++;
	return number;
}

/* Offer what is kept; the stream ends when that was its rest. */
static void
deliver_kept(Mux *mux, int i)
{
	Stream *stream = &mux->streams[i];

	if (stream->kept_len > 0)
	{
		size_t n = mux->events.deliver(mux->events.arg, i, stream->kept + stream->kept_at,
									   stream->kept_len);

		if (n == MUX_END)
		{
			let_go(stream);
			return;
		}
		stream->kept_at += n;
		stream->kept_len -= n;
		stream->taken += (uint32_t) n;
	}
	if (stream->kept_len > 0)
		return;
	free(stream->kept);
	stream->kept = NULL;
	if (stream->close_received)
	{
		let_go(stream);
		mux->events.closed(mux->events.arg, i);
	}
}

static const char *
take_hello(Mux *mux)
{
	uint64_t sender = get_number(mux->frame + HEAD + MAGIC_LEN, 8, 8);
	uint64_t receiver = get_number(mux->frame + HEAD + MAGIC_LEN + 8, 8, 8);
	bool knows_us = receiver == mux->own;

	if (mux->frame[1] != PROTOCOL_CABLE_VERSION)
		return "it speaks another version";
	if (sender == 0)
		return "it has no nonce";
	if (sender != mux->peer)
		mux->told_peer = false;
	if (mux->synced && (!knows_us || sender != mux->peer))
	{
		mux->synced = false;
		drop_streams(mux);
	}
	mux->peer = sender;
	mux->synced = knows_us;
	if (!knows_us || !mux->told_peer)
		mux->hello_due = true;
	return NULL;
}

static const char *
take_data(Mux *mux, int i, const uint8_t *bytes, size_t len)
{
	Stream *stream = &mux->streams[i];
	size_t n;

	if (len > stream->granted)
		return "a stream has sent more than it may";
	stream->granted -= (uint32_t) len;
	if (!stream->has_owner)
		return NULL; /* on its way when we closed */
	if (stream->kept == NULL)
	{
		n = mux->events.deliver(mux->events.arg, i, bytes, len);
		if (n == MUX_END)
		{
			let_go(stream);
			return NULL;
		}
		stream->taken += (uint32_t) n;
		if (n == len)
			return NULL;
		bytes += n;
		len -= n;
		stream->kept = malloc(WINDOW);
		stream->kept_at = 0;
	}
	/* there is room, since only for what was taken it gets new credit */
	if (stream->kept_at + stream->kept_len + len > WINDOW)
	{
		memmove(stream->kept, stream->kept + stream->kept_at, stream->kept_len);
		stream->kept_at = 0;
	}
	memcpy(stream->kept + stream->kept_at + stream->kept_len, bytes, len);
	stream->kept_len += len;
	return NULL;
}

static const char *
take_frame(Mux *mux)
{
	int kind = mux->frame[0];
	int i = mux->frame[1];
	size_t len = mux->frame_len - HEAD;
	Stream *stream;

	if (kind == PROTOCOL_CABLE_HELLO && mux->frame_len == HELLO_LEN &&
		memcmp(mux->frame + HEAD, PROTOCOL_CABLE_MAGIC, MAGIC_LEN) == 0)
		return take_hello(mux);
	if (!mux->synced)
		return NULL; /* for one that was here before us */
	if (kind == PROTOCOL_CABLE_MESSAGE)
		return mux->frame_len < PIECE_HEAD ? NULL /* cut off: one that is new will say so */
										   : "a wrong piece";
	if (i >= MUX_STREAMS)
		return "no such stream";
	stream = &mux->streams[i];
	if (kind == PROTOCOL_CABLE_OPEN)
	{
		if (len != 0 || mux->events.opened == NULL || stream->state != STREAM_FREE)
			return "a stream may not be opened";
		stream->state = STREAM_OPEN;
		stream->credit = stream->granted = WINDOW;
		stream->has_owner = mux->events.opened(mux->events.arg, i);
		stream->close_due = !stream->has_owner;
		return NULL;
	}
	if (stream->state != STREAM_OPEN || stream->close_received)
		return "a stream that is not open";
	switch (kind)
	{
		case PROTOCOL_CABLE_DATA:
			return len > 0 ? take_data(mux, i, mux->frame + HEAD, len) : "no data";

		case PROTOCOL_CABLE_CREDIT:
		{
			uint32_t more = len == 4 ? (uint32_t) get_number(mux->frame + HEAD, 4, 8) : 0;

			if (more == 0 || more > WINDOW - stream->credit)
				return "a wrong credit";
			stream->credit += more;
			return NULL;
		}

		case PROTOCOL_CABLE_CLOSE:
			if (len != 0)
				return "an end of wrong length";
			stream->close_received = true;
			stream->credit = 0;
			if (stream->has_owner)
				deliver_kept(mux, i);
			else if (stream->close_sent)
				forget_stream(stream);
			return NULL;

		default:
			return "an unknown frame";
	}
}

/* How many bytes there are before the next END or ESCAPE; eight at a time, since most are neither. */
static size_t
plain_len(const uint8_t *bytes, size_t len)
{
	const uint64_t ones = UINT64_C(0x0101010101010101);
	const uint64_t high = UINT64_C(0x8080808080808080);
	size_t n = 0;

	while (len - n >= sizeof(uint64_t))
	{
		uint64_t word, end, escape;

		memcpy(&word, bytes + n, sizeof(word));
		end = word ^ (ones * PROTOCOL_CABLE_END);
		escape = word ^ (ones * PROTOCOL_CABLE_ESCAPE);
		/* whether one of its bytes is 0: "Bit Twiddling Hacks", S. E. Anderson */
		if (((end - ones) & ~end & high) != 0 || ((escape - ones) & ~escape & high) != 0)
			break;
		n += sizeof(word);
	}
	while (n < len && bytes[n] != PROTOCOL_CABLE_END && bytes[n] != PROTOCOL_CABLE_ESCAPE)
		n++;
	return n;
}

/* Bytes of a frame. */
static void
add_to_frame(Mux *mux, const uint8_t *bytes, size_t len)
{
	if (len > sizeof(mux->frame) - mux->frame_len)
	{
		mux->is_broken = true;
		return;
	}
	memcpy(mux->frame + mux->frame_len, bytes, len);
	mux->frame_len += len;
}

static const char *
end_frame(Mux *mux)
{
	const char *problem = NULL;

	mux->frames += mux->frame_len > 0;
	if (mux->is_broken || mux->is_escaped || mux->frame_len == 1)
		problem = mux->synced ? "not a frame" : NULL;
	else if (mux->frame_len > 0)
		problem = take_frame(mux);
	mux->frame_len = 0;
	mux->is_escaped = mux->is_broken = false;
	return problem;
}

/* Whether the next byte is of the head of a piece. */
static bool
is_in_piece_head(const Mux *mux, uint8_t byte)
{
	return mux->synced && !mux->is_escaped && !mux->is_broken && byte < 0x80 &&
		   (mux->frame_len > 0 ? mux->frame[0] : byte) == PROTOCOL_CABLE_MESSAGE;
}

/* The head of a piece has come. */
static const char *
begin_piece(Mux *mux)
{
	size_t len = get_number(mux->frame + 1, 3, 7);
	size_t whole = get_number(mux->frame + 4, 4, 7);

	mux->frames++;
	mux->frame_len = 0;
	if ((whole == 0) != (mux->in_len > 0))
		return "a message's pieces are not in order";
	if (len == 0 || len > PIECE || len > (whole > 0 ? whole : mux->in_len - mux->in_at))
		return "a piece of wrong length";
	if (whole > 0)
	{
		mux->in = mux->events.expect(mux->events.arg, whole);
		mux->in_at = 0;
		mux->in_len = whole;
	}
	mux->piece_left = len;
	mux->check_left = NONCE;
	return NULL;
}

size_t
mux_room(const Mux *mux, uint8_t **at)
{
	if (mux->piece_left == 0 || mux->in == NULL)
		return 0;
	*at = mux->in + mux->in_at;
	return mux->piece_left;
}

void
mux_placed(Mux *mux, size_t len)
{
	mux->in_at += len;
	mux->piece_left -= len;
}

/* What has come as the nonce after a piece: how much of it is right, and whether the rest is END. */
static int
right_len(const Mux *mux, bool *is_filled)
{
	int right = 0, i;

	while (right < NONCE && mux->check[right] == (uint8_t) (mux->own >> (56 - 8 * right)))
		right++;
	for (i = right; i < NONCE && mux->check[i] == PROTOCOL_CABLE_END; i++)
		;
	*is_filled = i == NONCE;
	return right;
}

/* Bytes of a piece; returns how many of them. */
static size_t
take_plain(Mux *mux, const uint8_t *bytes, size_t len, const char **problem)
{
	bool is_right, is_filled;

	if (mux->piece_left > 0)
	{
		if (len > mux->piece_left)
			len = mux->piece_left;
		if (mux->in != NULL)
			memcpy(mux->in + mux->in_at, bytes, len);
		mux_placed(mux, len);
		return len;
	}
	if (len > mux->check_left)
		len = mux->check_left;
	memcpy(mux->check + NONCE - mux->check_left, bytes, len);
	mux->check_left -= len;
	if (mux->check_left > 0)
		return len;
	is_right = right_len(mux, &is_filled) == NONCE;
	/* else it may be one that is new who has filled it up */
	if (!is_right && !is_filled)
		*problem = "a piece of somebody else's";
	else if (!is_right || mux->in_at == mux->in_len)
	{
		bool is_taken = mux->in != NULL;

		mux->in = NULL;
		mux->in_len = 0;
		if (is_taken)
			mux->events.message(mux->events.arg, is_right);
	}
	return len;
}

const char *
mux_input(Mux *mux, const uint8_t *bytes, size_t len)
{
	const char *problem = NULL;

	while (len > 0 && problem == NULL)
	{
		size_t n = 0;

		if (mux->check_left > 0)
			n = take_plain(mux, bytes, len, &problem);
		else if (is_in_piece_head(mux, *bytes))
		{
			n = 1;
			add_to_frame(mux, bytes, n);
			if (mux->frame_len == PIECE_HEAD)
				problem = begin_piece(mux);
		}
		else if (!mux->is_escaped && (n = plain_len(bytes, len)) > 0)
			add_to_frame(mux, bytes, n);
		else
		{
			uint8_t byte = *bytes;

			n = 1;
			if (byte == PROTOCOL_CABLE_END)
			{
				problem = end_frame(mux);
				/* what fills up an unfinished piece is many of these */
				while (n < len && bytes[n] == PROTOCOL_CABLE_END)
					n++;
			}
			else if (!mux->is_escaped)
				mux->is_escaped = true;
			else
			{
				mux->is_escaped = false;
				mux->is_broken = mux->is_broken || (byte != PROTOCOL_CABLE_IS_END &&
													byte != PROTOCOL_CABLE_IS_ESCAPE);
				byte = byte == PROTOCOL_CABLE_IS_END ? PROTOCOL_CABLE_END : PROTOCOL_CABLE_ESCAPE;
				add_to_frame(mux, &byte, 1);
			}
		}
		bytes += n;
		len -= n;
	}
	return problem;
}

/* ---- what goes ---- */

static uint8_t *
encode(uint8_t *at, const uint8_t *bytes, size_t len)
{
	while (len > 0)
	{
		size_t n = plain_len(bytes, len);

		memcpy(at, bytes, n);
		at += n;
		if (n < len)
		{
			*at++ = PROTOCOL_CABLE_ESCAPE;
			*at++ =
				bytes[n] == PROTOCOL_CABLE_END ? PROTOCOL_CABLE_IS_END : PROTOCOL_CABLE_IS_ESCAPE;
			n++;
		}
		bytes += n;
		len -= n;
	}
	return at;
}

static uint8_t *
put_frame(uint8_t *at, int kind, int number, const uint8_t *bytes, size_t len)
{
	uint8_t head[HEAD] = {(uint8_t) kind, (uint8_t) number};

	at = encode(at, head, HEAD);
	at = encode(at, bytes, len);
	*at++ = PROTOCOL_CABLE_END;
	return at;
}

static uint8_t *
put_hello(Mux *mux, uint8_t *at)
{
	uint8_t bytes[MAGIC_LEN + 16];
	int i;

	memcpy(bytes, PROTOCOL_CABLE_MAGIC, MAGIC_LEN);
	for (i = 0; i < 8; i++)
	{
		bytes[MAGIC_LEN + i] = (uint8_t) (mux->own >> (56 - 8 * i));
		bytes[MAGIC_LEN + 8 + i] = (uint8_t) (mux->peer >> (56 - 8 * i));
	}
	mux->hello_due = false;
	mux->told_peer = mux->peer != 0;
	*at++ = PROTOCOL_CABLE_END; /* of a frame that somebody has left unfinished */
	return put_frame(at, PROTOCOL_CABLE_HELLO, PROTOCOL_CABLE_VERSION, bytes, sizeof(bytes));
}

/* A frame of a stream, if there is anything to say, in at least MUX_MIN_ROOM bytes of room. */
static uint8_t *
put_next(Mux *mux, int i, uint8_t *at, size_t room)
{
	Stream *stream = &mux->streams[i];
	uint8_t bytes[PAYLOAD];
	size_t n;

	if (stream->state == STREAM_OPENING)
	{
		stream->state = STREAM_OPEN;
		stream->credit = stream->granted = WINDOW;
		return put_frame(at, PROTOCOL_CABLE_OPEN, i, NULL, 0);
	}
	if (stream->state == STREAM_FREE)
		return at;
	if (stream->close_due)
	{
		stream->close_due = false;
		stream->close_sent = true;
		at = put_frame(at, PROTOCOL_CABLE_CLOSE, i, NULL, 0);
		if (stream->close_received)
			forget_stream(stream);
		return at;
	}
	if (stream->taken >= WINDOW / 2 && stream->has_owner && !stream->close_received)
	{
		for (n = 0; n < 4; n++)
			bytes[n] = (uint8_t) (stream->taken >> (24 - 8 * n));
		stream->granted += stream->taken;
		stream->taken = 0;
		return put_frame(at, PROTOCOL_CABLE_CREDIT, i, bytes, 4);
	}
	if (!stream->is_ready || stream->credit == 0)
		return at;
	n = (room - 1) / 2 - HEAD;
	if (n > PAYLOAD)
		n = PAYLOAD;
	if (n > stream->credit)
		n = stream->credit;
	n = mux->events.fetch(mux->events.arg, i, bytes, n);
	if (n == MUX_END)
	{
		let_go(stream);
		return put_next(mux, i, at, room);
	}
	if (n == 0)
	{
		stream->is_ready = false;
		return at;
	}
	stream->credit -= (uint32_t) n;
	return put_frame(at, PROTOCOL_CABLE_DATA, i, bytes, n);
}

static uint8_t *
put_digits(uint8_t *at, size_t number, int len)
{
	while (len-- > 0)
		*at++ = (uint8_t) (number >> (7 * len) & 0x7f);
	return at;
}

/* The head of the next piece of a message, if there is one. */
static uint8_t *
put_piece(Mux *mux, uint8_t *at)
{
	size_t whole = 0;

	mux->piece_missed = false;
	if (mux->out == NULL)
	{
		if (!mux->events.next(mux->events.arg, &mux->out, &mux->out_left))
			return at;
		whole = mux->out_left;
	}
	mux->plain_left = mux->out_left < PIECE ? mux->out_left : PIECE;
	mux->check_due = true;
	*at++ = PROTOCOL_CABLE_MESSAGE;
	at = put_digits(at, mux->plain_left, 3);
	return put_digits(at, whole, 4);
}

const uint8_t *
mux_plain(const Mux *mux, size_t *len)
{
	*len = mux->plain_left;
	return mux->out;
}

void
mux_plain_sent(Mux *mux, size_t len)
{
	mux->out += len;
	mux->out_left -= len;
	mux->plain_left -= len;
	if (mux->out_left == 0)
	{
		mux->out = NULL;
		mux->events.sent(mux->events.arg);
	}
}

/* The nonce that is the end of a piece. */
static uint8_t *
put_check(Mux *mux, uint8_t *at)
{
	int i;

	mux->check_due = false;
	for (i = 0; i < NONCE; i++)
		*at++ = (uint8_t) (mux->peer >> (56 - 8 * i));
	return at;
}

size_t
mux_output(Mux *mux, uint8_t *bytes, size_t room)
{
	uint8_t *at = bytes;
	uint8_t *end = bytes + room;
	int idle = 0;

	_Static_assert(NONCE + 1 + ENCODED(HELLO_LEN) <= MUX_MIN_ROOM, "room for a greeting");
	if (mux->fill_left > 0)
	{
		size_t n = mux->fill_left < room ? mux->fill_left : room;

		memset(at, PROTOCOL_CABLE_END, n);
		mux->fill_left -= n;
		return n;
	}
	if (mux->check_due)
		at = put_check(mux, at);
	if (mux->hello_due)
		at = put_hello(mux, at);
	if (mux->piece_missed)
	{
		uint8_t *before = at;

		at = put_piece(mux, at);
		if (at > before)
			return (size_t) (at - bytes);
	}
	/* a frame of each in turn */
	while (mux->synced && idle < MUX_STREAMS && end - at >= MUX_MIN_ROOM)
	{
		uint8_t *before = at;

		at = put_next(mux, mux->next, at, (size_t) (end - at));
		idle = at == before ? idle + 1 : 0;
		mux->next = (mux->next + 1) % MUX_STREAMS;
	}
	/* and then a piece, which has its turn first where there is no room for it */
	if (mux->synced && end - at >= PIECE_HEAD)
		at = put_piece(mux, at);
	else
		mux->piece_missed = mux->synced;
	return (size_t) (at - bytes);
}

/* ---- what the owner does ---- */

int
mux_open(Mux *mux)
{
	int i;

	for (i = 0; i < MUX_STREAMS; i++)
	{
		if (mux->streams[i].state == STREAM_FREE)
		{
			mux->streams[i].state = STREAM_OPENING;
			mux->streams[i].has_owner = true;
			return i;
		}
	}
	return -1;
}

bool
mux_is_open(const Mux *mux, int stream)
{
	return mux->streams[stream].state == STREAM_OPEN;
}

void
mux_close(Mux *mux, int stream)
{
	if (mux->streams[stream].has_owner)
		let_go(&mux->streams[stream]);
}

void
mux_ready(Mux *mux, int stream)
{
	if (mux->streams[stream].has_owner)
		mux->streams[stream].is_ready = true;
}

void
mux_resume(Mux *mux, int stream)
{
	if (mux->streams[stream].has_owner && mux->streams[stream].kept_len > 0)
		deliver_kept(mux, stream);
}
