/*-------------------------------------------------------------------------
 *
 * peers.c
 *		Addresses that connect, and the tokens they show.
 *
 *-------------------------------------------------------------------------
 */
#include <ctype.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <utlist.h>

#include "../common/log.h"
#include "server_private.h"

#define LINGER_MS 60000 /* an address's counters are kept so long */
#define TURN_MS 20
#define WAIT_MS 6000 /* for a turn: less than a runtime waits for its answer */

void
peer_address(struct lws *wsi, int fd, char *address, size_t size)
{
	struct sockaddr_storage storage;
	socklen_t len = sizeof(storage);
	unsigned char *b;

	snprintf(address, size, "unknown");
	if (wsi != NULL)
		fd = lws_get_socket_fd(wsi);
	if (fd < 0 || getpeername(fd, (struct sockaddr *) &storage, &len) != 0)
		return;
	if (storage.ss_family == AF_INET)
	{
		b = (unsigned char *) &((struct sockaddr_in *) &storage)->sin_addr;
		snprintf(address, size, "%d.%d.%d.%d", b[0], b[1], b[2], b[3]);
	}
	else if (storage.ss_family == AF_INET6)
	{
		b = (unsigned char *) &((struct sockaddr_in6 *) &storage)->sin6_addr;
		if (IN6_IS_ADDR_V4MAPPED((struct in6_addr *) b))
			snprintf(address, size, "%d.%d.%d.%d", b[12], b[13], b[14], b[15]);
		else
			snprintf(address, size, "%02x%02x:%02x%02x:%02x%02x:%02x%02x::/64", b[0], b[1], b[2],
					 b[3], b[4], b[5], b[6], b[7]);
	}
}

Peer *
peer_of(Server *server, const char *address)
{
	Peer *peer;

	HASH_FIND_STR(server->peers, address, peer);
	if (peer == NULL)
	{
		peer = calloc(1, sizeof(Peer));
		snprintf(peer->address, sizeof(peer->address), "%s", address);
		peer->window_began_at = uv_now(server->loop);
		HASH_ADD_STR(server->peers, address, peer);
	}
	if (uv_now(server->loop) - peer->window_began_at > LINGER_MS)
	{
		peer->refused = 0;
		peer->window_began_at = uv_now(server->loop);
	}
	return peer;
}

bool
may_connect(Server *server, const char *address)
{
	if (!server->draining &&
		server->counts.connections < (unsigned) server->options->max_connections &&
		peer_of(server, address)->connections < server->options->max_per_address)
		return true;
	server->counts.refused_connections++;
	return false;
}

/* Addresses without connections and with nothing to remember. */
void
forget_peers(Server *server)
{
	Peer *peer, *next;

	HASH_ITER(hh, server->peers, peer, next)
	{
		if (peer->connections == 0 && uv_now(server->loop) - peer->window_began_at > LINGER_MS)
		{
			HASH_DEL(server->peers, peer);
			free(peer);
		}
	}
}

static bool
may_try_tokens(Server *server, const Peer *peer)
{
	return peer == NULL || uv_now(server->loop) - peer->window_began_at > LINGER_MS ||
		   peer->refused < server->options->unauthenticated_rate;
}

void
note_refused(Server *server, struct lws *wsi)
{
	Peer *peer = lws_get_opaque_user_data(wsi);

	if (peer != NULL)
		peer_of(server, peer->address)->refused++;
}

/* The SHA-256 of the request's bearer token; false when there is none that could be one. */
bool
read_token(struct lws *wsi, uint8_t *hash)
{
	char header[PROTOCOL_MAX_TOKEN + 16];
	int len = lws_hdr_copy(wsi, header, sizeof(header), WSI_TOKEN_HTTP_AUTHORIZATION);
	const char *token = header + 7;
	const char *c;
	bool ok;

	if (len < 7 + 16 || strncasecmp(header, "Bearer ", 7) != 0)
		return false;
	for (c = token; *c != '\0'; c++)
	{
		if (!isalnum((unsigned char) *c) && strchr("-._~+/=", *c) == NULL)
			return false;
	}
	log_line(LOG_LEVEL_DEBUG, "token", "token", log_token(token), NULL);
	ok = EVP_Digest(token, strlen(token), hash, NULL, EVP_sha256(), NULL) == 1;
	OPENSSL_cleanse(header, sizeof(header));
	return ok;
}

int
check_token(Server *server, struct lws *wsi, bool is_of_session, uint8_t *hash)
{
	const Peer *peer = lws_get_opaque_user_data(wsi);
	bool is_token = read_token(wsi, hash);

	if (is_token && is_of_session && sessions_know(server->sessions, hash))
		return 0;
	/* a VM by its socket has no neighbours */
	if (!may_try_tokens(server, peer) &&
		(!is_token || peer->is_vm || server->options->unauthenticated_lookups == 0))
		return 429;
	if (is_token)
		return 0;
	note_refused(server, wsi);
	return 401;
}

/* ---- turns: a token bucket for all addresses, and a queue for each ---- */

static bool
take_lookup(Server *server)
{
	uint64_t now = uv_now(server->loop);
	double rate = server->options->unauthenticated_lookups;

	server->lookups += (double) (now - server->lookups_at) * rate / 1000;
	server->lookups_at = now;
	if (server->lookups > rate)
		server->lookups = rate;
	if (server->lookups < 1)
		return false;
	server->lookups -= 1;
	return true;
}

static void
on_turns(uv_timer_t *timer)
{
	Server *server = timer->data;
	Peer *peer, *next;

	while (server->queue != NULL && take_lookup(server))
	{
		Turn *turn;

		peer = server->queue;
		DL_DELETE(server->queue, peer);
		DL_APPEND(server->queue, peer);
		turn = peer->waiting;
		leave_queue(server, turn);
		turn->come(turn->arg, true);
	}
	DL_FOREACH_SAFE(server->queue, peer, next)
	{
		Turn *turn;

		while ((turn = peer->waiting) != NULL && uv_now(server->loop) - turn->since >= WAIT_MS)
		{
			leave_queue(server, turn);
			turn->come(turn->arg, false);
		}
	}
	if (server->queue == NULL)
		uv_timer_stop(timer);
}

bool
wait_for_turn(Server *server, struct lws *wsi, bool is_of_session, const uint8_t *hash, Turn *turn,
			  void (*come)(void *arg, bool may), void *arg)
{
	Peer *peer = lws_get_opaque_user_data(wsi);

	if (may_try_tokens(server, peer) || (is_of_session && sessions_know(server->sessions, hash)) ||
		(server->queue == NULL && take_lookup(server)))
		return false;
	turn->peer = peer;
	turn->come = come;
	turn->arg = arg;
	turn->since = uv_now(server->loop);
	if (peer->waiting == NULL)
		DL_APPEND(server->queue, peer);
	DL_APPEND(peer->waiting, turn);
	if (!uv_is_active((uv_handle_t *) server->turns))
		uv_timer_start(server->turns, on_turns, TURN_MS, TURN_MS);
	return true;
}

void
leave_queue(Server *server, Turn *turn)
{
	Peer *peer = turn->peer;

	if (peer == NULL)
		return;
	turn->peer = NULL;
	DL_DELETE(peer->waiting, turn);
	if (peer->waiting == NULL)
		DL_DELETE(server->queue, peer);
}
