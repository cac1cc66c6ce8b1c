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
 * A VM without a network says all that over a cable, which carries several byte
 * streams: see common/mux.h.
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

/* The cable between a VM's virtio port and a gateway: see common/mux.h */
#define PROTOCOL_CABLE_VERSION 1
#define PROTOCOL_CABLE_STREAMS 16 /* of one VM at once, numbered from 0 */
#define PROTOCOL_CABLE_WINDOW                                                                      \
	(16 * 1024)						/* bytes of a stream under way or not yet taken, each way */
#define PROTOCOL_CABLE_PAYLOAD 4096 /* bytes of a stream in one frame */

#define PROTOCOL_CABLE_END 0xc0		  /* ends a frame */
#define PROTOCOL_CABLE_ESCAPE 0xdb	  /* in a frame: these two in place of END */
#define PROTOCOL_CABLE_IS_END 0xdc	  /* ESCAPE IS_END stands for END */
#define PROTOCOL_CABLE_IS_ESCAPE 0xdd /* ESCAPE IS_ESCAPE stands for ESCAPE */

#define PROTOCOL_CABLE_HELLO                                                                       \
	1 /* version, nonce of the sender (8), of the receiver as last heard or 0 (8) */
#define PROTOCOL_CABLE_OPEN 2	/* stream; the guest only */
#define PROTOCOL_CABLE_DATA 3	/* stream, bytes */
#define PROTOCOL_CABLE_CREDIT 4 /* stream, bytes that may be sent in addition (2) */
#define PROTOCOL_CABLE_CLOSE 5	/* stream */

#endif /* AGENTVM_PROTOCOL_H */
