/*-------------------------------------------------------------------------
 *
 * server_private.h
 *		What the files of the server share.
 *
 *-------------------------------------------------------------------------
 */
#ifndef GATEWAY_SERVER_PRIVATE_H
#define GATEWAY_SERVER_PRIVATE_H

#include <jansson.h>
#include <libwebsockets.h>
#include <openssl/ssl.h>
#include <uthash.h>

#include "../protocol.h"
#include "server.h"
#include "sessions.h"
#include "vms.h"

/* A token that is to be looked up when it is its address's turn. */
typedef struct Turn
{
	struct Peer *peer; /* NULL: it does not wait */
	void (*come)(void *arg, bool may);
	void *arg;
	uint64_t since;
	struct Turn *prev, *next;
} Turn;

/* Connections and refused tokens of one address (of IPv6: of one /64). */
typedef struct Peer
{
	char address[48]; /* key */
	bool is_vm;
	int connections;
	int refused;
	uint64_t window_began_at;
	Turn *waiting; /* a list */
	struct Peer *prev, *next;
	UT_hash_handle hh;
} Peer;

/*
 * Bytes of a call on their way, in one piece of memory that counts as server->buffered.
 * What is used begins at "at", before which there is room for libwebsockets.
 */
typedef struct Buffer
{
	struct Buffer *prev, *next; /* of a channel's queue */
	struct Call *call;			/* whose request it is there; NULL: nobody waits for the answer */
	bool is_begun;				/* some of it has been sent */
	size_t size;				/* room from bytes on */
	size_t at, end;
	unsigned char bytes[];
} Buffer;

/* What calls.c keeps of a channel. */
typedef struct ChannelCalls
{
	struct Call *by_number; /* that it has been passed, and has not answered */
	uint32_t last_number;
	unsigned under_way; /* those for whose answers somebody waits */
	bool drains;		/* it is closed when there are none any more */
} ChannelCalls;

typedef struct CallCounts
{
	uint64_t outcomes[600]; /* by status */
	uint64_t bytes_down, bytes_up;
	uint64_t bad_tickets;
	unsigned under_way;
	unsigned ends; /* to be logged */
	unsigned connections;
} CallCounts;

typedef struct HttpCounts
{
	uint64_t answers[600]; /* by status */
	uint64_t refused_connections;
	uint64_t frames;
	unsigned connections;
	unsigned channels;
} HttpCounts;

struct Server
{
	uv_loop_t *loop;
	const Options *options;
	struct lws_context *context;
	struct lws_vhost *vhost;
	struct Listener *listener;
	rlim_t descriptors;	  /* that the process may have */
	uv_prepare_t *rounds; /* counts them: */
	uint64_t round;		  /* of the loop */
	Vms *vms;
	const char *vm; /* whose stream is being taken over from vms.c, or NULL */
	struct lws_protocols protocols[3];
	SSL_CTX *tls, *control_tls;
	Sessions *sessions;
	Peer *peers;
	Peer *queue; /* those that have turns to wait for */
	uv_timer_t *turns;
	double lookups; /* that may be made now */
	uint64_t lookups_at;
	HttpCounts counts;
	CallCounts call_counts;
	struct Control *control; /* the control listener, or NULL */
	struct lws_context *control_context;
	struct Calls *calls;
	size_t buffered; /* bytes of calls */
	unsigned open_requests;
	bool draining;
};

/* ---- peers.c ---- */

/* The counters of an address, made if it is new; valid as long as it has connections. */
extern Peer *peer_of(Server *server, const char *address);

/* Whether one more connection of this address may be had; count one that may not. */
extern bool may_connect(Server *server, const char *address);

/* The address of a connection, or of a socket where there is no connection yet, as a key for peer_of(). */
extern void peer_address(struct lws *wsi, int fd, char *address, size_t size);

/* Drop the counters of addresses without connections and with nothing to remember. */
extern void forget_peers(Server *server);

/* The SHA-256 of the request's bearer token; false when there is none that could be one. */
extern bool read_token(struct lws *wsi, uint8_t *hash);

/*
 * The same, if it may be looked up: returns 0, or 401 when there is none that could
 * be one, or 429 when too many of this connection's address have been refused, and
 * it is no use to wait.  A session token that we know is good at any time, whoever
 * else is behind the address.
 */
extern int check_token(Server *server, struct lws *wsi, bool is_of_session, uint8_t *hash);

/*
 * Where too many of an address have been refused, tokens wait for their turn to be
 * looked up.  Returns false if this one has not to; else "come" is called, later,
 * unless leave_queue() is called first, and told whether it may.
 */
extern bool wait_for_turn(Server *server, struct lws *wsi, bool is_of_session, const uint8_t *hash,
						  Turn *turn, void (*come)(void *arg, bool may), void *arg);
extern void leave_queue(Server *server, Turn *turn);

/* Count a token that was refused. */
extern void note_refused(Server *server, struct lws *wsi);

/* ---- http.c, channel.c ---- */

/* One HTTP request and its answer; one WebSocket. Both are libwebsockets' "user". */
typedef struct Exchange Exchange;
typedef struct Channel Channel;
extern const size_t exchange_size;
extern const size_t channel_size;

extern Server *server_of(struct lws *wsi);

/*
 * Add the header Date, by the database's clock: deadlines are meant by that one, and
 * ours and that of a VM may be anything.  Returns nonzero when there is no room.
 */
extern int add_date(struct lws *wsi, unsigned char **at, unsigned char *end);

/*
 * Begin an answer: its status and headers, with so many seconds in Retry-After where the
 * status asks for that.  Returns false when there is no room; else the headers may be
 * added to, and are to be finalized.
 */
extern bool add_headers(struct lws *wsi, int status, const char *type, int retry_s, bool closes,
						size_t len, unsigned char **at, unsigned char *end);

/* Read a hash of HASH_LEN bytes from its hex digits; false when they are none, or hex is NULL. */
extern bool parse_hash(const char *hex, uint8_t *hash);

/* Answer an upgrade with that status, which is counted; the connection is then to be closed. */
extern void refuse_upgrade(struct lws *wsi, int status);

extern int http_callback(struct lws *wsi, enum lws_callback_reasons reason, void *user, void *in,
						 size_t len);
extern int channel_callback(struct lws *wsi, enum lws_callback_reasons reason, void *user, void *in,
							size_t len);

/* What sessions.c tells a channel: its session has ended; it was warm, and has been taken. */
extern void channel_ended(void *attached);
extern void channel_claimed(void *attached);

/* Close a channel, since the gateway is to end: another one will do. */
extern void channel_drain(void *attached);

/* Send a message as a binary frame, after what is there already; it becomes the channel's. */
extern void channel_push(Channel *channel, Buffer *message);

/* Take a message out of its queue, of which nothing has been sent. */
extern void channel_drop(Channel *channel, Buffer *message);

/* Tell it that the end of a command has been committed. */
extern void channel_note(Channel *channel, const char *command);

/* What vms.c tells of messages: "taker" is a channel, a message a Buffer, "arg" the server. */
extern void *channel_expect(void *arg, void *taker, size_t len, uint8_t **at);
extern void channel_come(void *arg, void *taker, void *message);
extern void *channel_next(void *arg, void *taker, const uint8_t **bytes, size_t *len);
extern void channel_sent(void *arg, void *message);

/* Close it with this code. */
extern void channel_close(Channel *channel, int code);

extern ChannelCalls *channel_calls(Channel *channel);

/* ---- calls.c: calls under way, whose commands they are, and what is logged of them ---- */

/* A buffer with room for so many bytes, or NULL: calls take as much memory as they may. */
extern Buffer *buffer_make(Server *server, size_t size);

/* The same with more room; NULL as above, and it is as it was. */
extern Buffer *buffer_grow(Server *server, Buffer *buffer, size_t size);
extern void buffer_free(Server *server, Buffer *buffer);

typedef struct Call Call;

/* The commands that are killed when a control connection is closed. */
typedef struct Owner
{
	struct Owned *all;
} Owner;

/* Status, and with 200 the message, which belongs to the callee; else NULL. */
typedef void (*CallDone)(void *arg, int status, Buffer *message);

extern void calls_create(Server *server);
extern void calls_destroy(Server *server);

/*
 * A call of a session by its message, which is checked and becomes the call's; NULL:
 * it makes no sense, and stays the caller's.  Nothing has happened yet.
 */
extern Call *call_make(Server *server, const char *session, Buffer *message);

/* The uuid of its command. */
extern const char *call_command(const Call *call);

/*
 * Begin it: "done" is called once, later or before this returns, unless
 * call_forget() is called first.  Its command is the owner's, if the message says
 * so.
 */
extern void call_begin(Call *call, Owner *owner, CallDone done, void *arg);

/* Nobody waits for its end any more; or it has not begun. */
extern void call_forget(Call *call);

/* Its request has been sent, and is not needed any more. */
extern void call_sent(Call *call);

/* Its request is another's from now on, who sends it. */
extern void call_taken(Call *call);

/* The owner is gone: what is his is ended.  keep: it is left alone. */
extern void owner_gone(Server *server, Owner *owner, bool keep);

/*
 * A message has come up a channel, of which the number is the first part; it becomes
 * ours.  Returns 0, or the code with which the channel is to be closed.
 */
extern int calls_answer(Server *server, Channel *channel, Buffer *message);

/* The channel tells of the end of a command: 0, or the code with which it is to be closed. */
extern int calls_told_end(Server *server, Session *session, json_t *frame);

/* A channel is closed or is not its session's any more. */
extern void calls_lost(Server *server, Channel *channel);

/* The database is there. */
extern void calls_up(Server *server);

/* ---- control.c: the control listener ---- */

/* Listen as the options say, or not at all; false, having logged why, if that cannot be. */
extern bool control_create(Server *server);
extern void control_destroy(Server *server);

/* The database is there. */
extern void control_up(Server *server);

/* How many connections it may have with so many descriptors. */
extern int control_max_connections(const Options *options, rlim_t descriptors);

/* ---- server.c ---- */

#define SPARE_DESCRIPTORS 64	   /* for all but connections */
#define SERVICE_BUFFER (64 * 1024) /* bytes that are read at once */

/* What contexts of libwebsockets have in common; with TLS, if there is a certificate and it is wanted. */
extern void fill_context_info(Server *server, struct lws_context_creation_info *info, void **loops,
							  bool with_tls);

/* ---- http.c ---- */

#define LENGTH_NONE (-1)
#define LENGTH_WRONG (-2)

/* The Content-Length; one that we take for another than libwebsockets does would make two requests of one. */
extern long body_length(struct lws *wsi);

#endif /* GATEWAY_SERVER_PRIVATE_H */
