/*-------------------------------------------------------------------------
 *
 * protocol.h
 *		What the gateway and the runtime say to each other (version 1).
 *
 * All bodies and frames are JSON objects.  Tokens travel as "Authorization: Bearer".
 *
 *	POST /v1/bootstrap	{"session_token_sha256", "boot_id", "runtime_version", "hostname"}
 *		200 {"session_id", "heartbeat_interval_s", "deadline", "deadline_grace_s",
 *			 "deadman_allowance_s", "env", "repos", "files", "channel"}
 *		401 unknown, expired or used by another; 410 session ended
 *	POST /v1/heartbeat	{}		200 {"deadline"}; 401; 410
 *	GET  /v1/channel	WebSocket, subprotocol "agentvm.v1"; 401 without a token
 *		A token is looked up after the handshake: {"type": "hello"} says that it is
 *		known, a close code below that it is not.
 *		up:	  {"type": "heartbeat"}
 *		down: {"type": "deadline", "deadline"} once the heartbeat has been committed
 *		down: {"type": "gone"}, then close code 4410, when the session has ended
 *	503 with Retry-After: the database is away, or the gateway is full or draining
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_PROTOCOL_H
#define AGENTVM_PROTOCOL_H

#define PROTOCOL_BOOTSTRAP "/v1/bootstrap"
#define PROTOCOL_HEARTBEAT "/v1/heartbeat"
#define PROTOCOL_CHANNEL "/v1/channel"
#define PROTOCOL_NAME "agentvm.v1" /* WebSocket subprotocol */

/* Bounds, in bytes; whatever is longer is refused. */
#define PROTOCOL_MAX_TOKEN 256
#define PROTOCOL_MAX_REQUEST (16 * 1024)  /* body of a request */
#define PROTOCOL_MAX_FRAME (64 * 1024)	  /* of the channel */
#define PROTOCOL_MAX_ANSWER (1024 * 1024) /* body of an answer: env and repos */

/* WebSocket close codes of our own */
#define PROTOCOL_CLOSE_UNKNOWN 4401	 /* unknown token */
#define PROTOCOL_CLOSE_REPLACED 4409 /* a newer channel of the same session has taken over */
#define PROTOCOL_CLOSE_GONE 4410	 /* the session has ended */
#define PROTOCOL_CLOSE_AWAY 4503	 /* the database is away, or the gateway ends: come again */

#endif /* AGENTVM_PROTOCOL_H */
