/*-------------------------------------------------------------------------
 *
 * mux.h
 *		Byte streams over one cable, which loses its place now and then.
 *
 * A VM without a network has one virtio port; the other end of it is a socket of
 * its QEMU, to which a gateway connects.  The guest opens streams, and each is to
 * the gateway as if it had been accepted by its listener.
 *
 * Nothing in here does any input or output: bytes from the cable go in with
 * mux_input(), bytes for the cable come out of mux_output(), and what belongs to a
 * stream passes through callbacks.
 *
 * Frames (constants in protocol.h).  The bytes of a frame are followed by END; an
 * END or ESCAPE within it is written as two bytes, so that whoever comes in the
 * middle finds the next frame.  The first byte is the kind, the second the number
 * of a stream (of HELLO: the version); numbers are in network order.
 *
 *	HELLO	MAGIC, so that no bytes of a piece are taken for it; nonce of the sender, nonce of
 *			the receiver as the sender knows it or 0
 *	OPEN	a stream of that number begins
 *	DATA	bytes of a stream, from 1 to PAYLOAD
 *	CREDIT	so many bytes more may be sent on a stream; it begins with WINDOW
 *	CLOSE	the sender neither sends nor takes any more; both ends say so, and then
 *			the number is free
 *
 * Beside the streams there are messages, which are for much at once: they go in
 * pieces whose bytes are as they are, so that neither end has to look at each.
 *
 *	MESSAGE	bytes of this piece (3 digits of 7 bits, so that none of them needs an
 *			ESCAPE), of the whole message (4 digits) or 0 in all but the first piece; no
 *			END, but at once so many bytes, and then the receiver's nonce
 *
 * An end that is replaced in the middle of a piece leaves the other one to take for
 * its rest what the next one says: so whoever is new begins with as many ENDs as
 * that can be, which no nonce is made of.  Such a piece is dropped with its message.
 * A message is not acknowledged, and there is no credit for it: it is for what the
 * receiver has asked for or has made room for in another way.
 *
 * Either end may be replaced at any time by one that knows nothing: the runtime is
 * started again, the gateway is killed and the next one takes its place.  Bytes for
 * the one before may still be on their way then, a frame may lack its beginning or
 * its end, and nobody need have noticed.  So an end that is new, or has lost its
 * faith in the cable, takes a random nonce, sends an END and HELLO, and ignores
 * everything up to a HELLO that repeats its nonce: only that one is surely from an
 * end that knows it.  A HELLO without our nonce tells that the other end is new:
 * what streams there are have ended, and it is answered with ours.  Neither sends
 * anything but HELLO before it has been recognized.
 *
 * Memory is bounded, whatever the other end does: one frame is decoded at a time,
 * and of a stream no more than WINDOW bytes are kept, for which memory is had only
 * while its owner does not take them.  What is to be said is kept as marks on the
 * streams, not in a queue.
 *
 *-------------------------------------------------------------------------
 */
#ifndef COMMON_MUX_H
#define COMMON_MUX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../protocol.h"

#define MUX_STREAMS PROTOCOL_CABLE_STREAMS
#define MUX_END ((size_t) -1) /* see below */

/* mux_output() needs this much room to say whatever there may be to say. */
#define MUX_MIN_ROOM 64

typedef struct Mux Mux;

/*
 * What the owner of the streams does.  A stream ends for it exactly once: when it
 * calls mux_close(), returns MUX_END, or is told by "closed"; the mux does not
 * mention it any more then, nor may the owner.  None of these functions may call
 * the mux, except for mux_close() of other streams.
 */
typedef struct MuxEvents
{
	/* The other end has opened a stream; false refuses it. NULL: it may not. */
	bool (*opened)(void *arg, int stream);

	/*
	 * Bytes have come. Returns how many were taken; if it is not all, mux_resume()
	 * asks for the rest to be offered again. Or MUX_END.
	 */
	size_t (*deliver)(void *arg, int stream, const uint8_t *bytes, size_t len);

	/*
	 * Fill in bytes to be sent. Returns how many, or 0 when there are none before
	 * the next mux_ready(), or MUX_END when there are no more ever.
	 */
	size_t (*fetch)(void *arg, int stream, uint8_t *bytes, size_t room);

	/* The stream has ended: the other end closed it, all it sent having been taken, or is not there any more. */
	void (*closed)(void *arg, int stream);

	/* A message of so many bytes comes: returns room for it, or NULL: it is not taken. */
	uint8_t *(*expect)(void *arg, size_t len);

	/* It is whole, or what is missing does not come any more; the room is the owner's again. */
	void (*message)(void *arg, bool is_whole);

	/* Set the next message to be sent, which stays as it is until "sent"; false: there is none for now. */
	bool (*next)(void *arg, const uint8_t **bytes, size_t *len);

	/* It has been sent, or the other end is not there any more. */
	void (*sent)(void *arg);

	void *arg;
} MuxEvents;

/* One end of a cable; mux_restart() is to be called before anything else. "events" is copied. */
extern Mux *mux_create(const MuxEvents *events);

/* Forget everything, without a word to the owner of the streams. */
extern void mux_free(Mux *mux);

/*
 * Begin anew: the cable is another one, or the other end is gone or makes no sense.
 * "nonce" is a random number that is not 0.  Streams end ("closed" is called),
 * except for those that the other end has not heard of.
 */
extern void mux_restart(Mux *mux, uint64_t nonce);

/* Whether the other end is there and knows us. */
extern bool mux_is_synced(const Mux *mux);

/* How many streams there are, and how many frames have come since mux_create(). */
extern int mux_streams(const Mux *mux);
extern uint64_t mux_frames(const Mux *mux);

/*
 * Bytes have come through the cable.  Returns NULL, or a static text that says why
 * they make no sense; the rest of them is lost then, and mux_restart() is due.
 */
extern const char *mux_input(Mux *mux, const uint8_t *bytes, size_t len);

/*
 * How many of the next bytes of the cable are a message's, and where they may be
 * put: mux_placed() then tells how many have been, in place of mux_input().  Any
 * number of them may be given to mux_input() as well.
 */
extern size_t mux_room(const Mux *mux, uint8_t **at);
extern void mux_placed(Mux *mux, size_t len);

/*
 * Fill in bytes for the cable, which must be sent or lost with the cable; returns
 * how many, 0 for none.  "room" must be at least MUX_MIN_ROOM.
 */
extern size_t mux_output(Mux *mux, uint8_t *bytes, size_t room);

/*
 * Bytes of a message that follow what mux_output() has filled in last, before it is
 * called again; *len is how many there are, and may be 0.  mux_plain_sent() tells
 * how many have been sent.
 */
extern const uint8_t *mux_plain(const Mux *mux, size_t *len);
extern void mux_plain_sent(Mux *mux, size_t len);

/* Open a stream, at once or when the other end is there; returns its number, or -1 when all are in use. */
extern int mux_open(Mux *mux);

/* Whether the other end may have heard of a stream. */
extern bool mux_is_open(const Mux *mux, int stream);

/* The owner has done with a stream: what it did not take is dropped. */
extern void mux_close(Mux *mux, int stream);

/* There may be bytes to fetch; the owner takes bytes again. */
extern void mux_ready(Mux *mux, int stream);
extern void mux_resume(Mux *mux, int stream);

#endif /* COMMON_MUX_H */
