/*-------------------------------------------------------------------------
 *
 * link.h
 *		Requests to the gateway, and the channel: HTTP and WebSocket by libwebsockets.
 *
 *-------------------------------------------------------------------------
 */
#ifndef RUNTIME_LINK_H
#define RUNTIME_LINK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "settings.h"

#define LINK_ROOM 32 /* see link_call() */

typedef struct Link Link;

/* What came of a request. */
typedef struct Answer
{
	int status;			 /* of HTTP; 0: none came, and "problem" says why */
	const char *problem; /* valid during the call, as is "body" */
	const char *body;
	size_t len;
	int64_t date;			/* the server's clock in ms since 1970, or NO_TIME */
	int64_t retry_after_ms; /* 0: not said */
} Answer;

typedef void (*LinkAnswered)(void *arg, const Answer *answer);

typedef struct ChannelEvents
{
	void (*opened)(void *arg, int64_t date); /* the handshake is done; "date" as in Answer */
	void (*frame)(void *arg, const char *text, size_t len);
	void (*call)(void *arg, const char *bytes, size_t len); /* a binary frame */
	void (*sent)(void *arg); /* a frame has left: there may be room for another */
	void (*closed)(void *arg, int code, const char *why); /* or never opened; code 0: none */
} ChannelEvents;

/*
 * Begin to talk to the gateway that the settings name; they must stay.  To be
 * called once, before anything else in here or in loop.h.  Returns NULL, or a
 * static text that says what is wrong.
 */
extern const char *link_setup(const Settings *settings);

/*
 * POST a JSON body.  "answered" is called later, once, unless link_drop() is called
 * first; http_timeout bounds everything from the look-up of the name on.  Strings
 * are copied.
 */
extern Link *link_post(const char *path, const char *token, const char *body, LinkAnswered answered,
					   void *arg);

/*
 * Open the channel.  "closed" is called once, unless link_drop() is called first,
 * and the Link is gone then.  "events" must stay.
 */
extern Link *link_channel(const char *path, const char *token, const ChannelEvents *events,
						  void *arg);

/*
 * Send a text frame on an open channel, before all binary ones that wait; false when
 * too many wait already.
 */
extern bool link_send(Link *link, const char *text);

/* Whether no text frame waits: that is when those that are not urgent may be sent. */
extern bool link_is_free(const Link *link);

/* Whether another binary frame may be sent; if not, after "sent" it may be. */
extern bool link_has_room(const Link *link);

/*
 * Where there is room, send a binary frame: "len" bytes at "bytes" (at most
 * PROTOCOL_MAX_MESSAGE + 4), which is in a piece of malloc()'s memory that becomes the
 * link's, at least LINK_ROOM after its beginning.
 */
extern void link_call(Link *link, void *memory, char *bytes, size_t len);

/*
 * Let calls and their answers go beside the channel, which is open, where there is
 * a way for that: as messages of the cable (relay.h).
 */
extern void link_use_cable(Link *link);

/* End a request or a channel without a further call. */
extern void link_drop(Link *link);

#endif /* RUNTIME_LINK_H */
