/*-------------------------------------------------------------------------
 *
 * server_private.h
 *		What the files of the server share.
 *
 *-------------------------------------------------------------------------
 */
#ifndef GATEWAY_SERVER_PRIVATE_H
#define GATEWAY_SERVER_PRIVATE_H

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
	uv_poll_t *listener;
	uv_prepare_t *rounds; /* counts them: */
	uint64_t round;		  /* of the loop */
	uv_timer_t *pause;	  /* when connections cannot be accepted */
	bool cannot_accept;	  /* and the log says so */
	Vms *vms;
	const char *vm; /* whose stream is being taken over from vms.c, or NULL */
	struct lws_protocols protocols[3];
	SSL_CTX *tls;
	Sessions *sessions;
	Peer *peers;
	Peer *queue; /* those that have turns to wait for */
	uv_timer_t *turns;
	double lookups; /* that may be made now */
	uint64_t lookups_at;
	HttpCounts counts;
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

/* Answer an upgrade with that status, which is counted; the connection is then to be closed. */
extern void refuse_upgrade(struct lws *wsi, int status);

extern int http_callback(struct lws *wsi, enum lws_callback_reasons reason, void *user, void *in,
						 size_t len);
extern int channel_callback(struct lws *wsi, enum lws_callback_reasons reason, void *user, void *in,
							size_t len);

/* What sessions.c tells a channel: its session has ended. */
extern void channel_ended(void *attached);

/* Close a channel, since the gateway is to end: another one will do. */
extern void channel_drain(void *attached);

#endif /* GATEWAY_SERVER_PRIVATE_H */
