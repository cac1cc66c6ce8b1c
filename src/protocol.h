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
 *	POST /v1/hydrate	{}, with the session token, by the runtime of a warm VM
 *		200 as for the bootstrap, once somebody has taken the VM; 409 nobody has; 401; 410
 *		{"problem": text}: the VM cannot be what was asked for; its session is ended
 *	POST /v1/heartbeat	{}		200 {"deadline"}; 401; 410
 *	GET  /v1/channel	WebSocket, subprotocol "agentvm.v1"; 401 without a token
 *		A token is looked up after the handshake: {"type": "hello"} says that it is
 *		known, a close code below that it is not.
 *		up:	  {"type": "heartbeat"}
 *		down: {"type": "deadline", "deadline"} once the heartbeat has been committed
 *		down: {"type": "claimed"}: the VM, which was warm, has been taken: time to hydrate
 *		down: {"type": "gone"}, then close code 4410, when the session has ended
 *		down, up: calls and their answers, in binary frames: see below
 *		up:	  {"type": "cable"}: of a VM at a cable, that is ready for calls.  They and
 *			   their answers are messages of the cable then, not frames: the same bytes
 *		up:	  {"type": "ended", "command", "exit_code", "duration_ms", "stdout_bytes",
 *			   "stderr_bytes", "timed_out"}: a command has ended; said again on each new
 *			   channel until
 *		down: {"type": "noted", "command"} once that has been committed
 *	400, 404, 405, 408, 411, 413 makes no sense, is too slow or too large
 *	429 with Retry-After: too many tokens of this address have been refused
 *	503 with Retry-After: the database is away, or the gateway is full or draining
 *
 * Calls: what a backend of the database asks of a runtime.  It POSTs a message to
 * PROTOCOL_CALLS of the control listener of the gateway that holds the session's
 * channel; the gateway passes it down the channel, and the answer back.
 *
 *	message		length of the header (4 bytes, big-endian), header (a JSON object), bytes
 *	POST /v1/sessions/SESSION/calls		a message; Authorization: Ticket KEY-ID:EXPIRES:MAC
 *		MAC: in hex, HMAC-SHA256(control key, "agentvm call\nSESSION\nCOMMAND\nEXPIRES\nHASH"):
 *		EXPIRES in seconds since 1970 by the database's clock, COMMAND the uuid that the
 *		header names, HASH the SHA-256 of the message in hex
 *		200 the runtime's message
 *		400, 405, 411 makes no sense; 401 the ticket is not good; 404 no such path, or the
 *		session has no channel here; 408 it has not come in time; 409 the session is not
 *		ready; 410 it has ended; 413 too large; 429 too many calls of it are under way;
 *		503 not passed on: no database, no memory, or draining.  With these the runtime has
 *		not seen the call.  502 the channel was lost, 504 no answer: it may have
 *	a binary frame of the channel: number of the call (4 bytes, big-endian, chosen by the
 *		gateway, another one for each call under way), message
 *
 * Headers have "op" and "command", a uuid; whoever sends a message again sends the
 * same one, and it has no effect beyond that of the first.
 *
 *	start	bytes: the text of the command (command_len), then the first of its input
 *			{command_len, cwd, env, timeout_ms, max_output, input_len, age_ms, lease_ms, wait_ms}
 *			cwd may be null; input_len: all of its input, of which the rest comes with
 *			"input"; max_output: bytes kept of each stream; age_ms: how long ago the
 *			first message with this id was sent; lease_ms: 0, or the command is killed when
 *			nobody has asked for it for so long; then as output
 *			or in place of a text {"tar": {"extract"|"create": path, "file": path}}
 *	input	bytes at "offset" of its input, from the first that has not been
 *			taken: {offset}; answer {taken}: how far all is now
 *	output	{stdout, stderr, wait_ms, part}: offsets; waits so long until the command has ended
 *			or, with part, until there is more; with part the bytes there are, else
 *			those of a command that has ended
 *			answer {running, exit_code, timed_out, killed, duration_ms,
 *			   stdout: {total, from, len, lost}, stderr: the same}; bytes: len of stdout from
 *			   offset "from", then of stderr.  From > what was asked for: what is
 *			   between is not kept; lost: how much of the whole is not
 *	kill	{signal}: 15 or 9, to all of its processes; answer {running}: it was until then
 *	put		bytes at "offset" of a file that replaces "path" with the last of them:
 *			{path, mode, size, offset}; answer {written, any_order}: how far this one
 *			goes; true, if those between the first and the last may come in any order
 *	get		{path, offset, length, remove}; answer {size, version}: another version is
 *			another file; remove: the file is not needed after this; bytes
 *
 * An answer that tells of a failure is {error: CALL_..., message}.  For the gateway, a
 * header may have
 *	audit	{kind: "exec", "upload" or "download", role, ...}: to be committed to the log
 *			before the call is passed on; the gateway takes it out.  The end of a command
 *			is told by the runtime; that of a transfer is an error, or the answer to a
 *			call with "last": true
 *	owned	true: the command is killed (a transfer counts as ended) when the connection
 *			that has asked for it last is closed
 *
 * A VM without a network says all that over a cable, which carries several byte
 * streams, and messages: see common/mux.h.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_PROTOCOL_H
#define AGENTVM_PROTOCOL_H

#define PROTOCOL_BOOTSTRAP "/v1/bootstrap"
#define PROTOCOL_HYDRATE "/v1/hydrate"
#define PROTOCOL_HEARTBEAT "/v1/heartbeat"
#define PROTOCOL_CHANNEL "/v1/channel"
#define PROTOCOL_NAME "agentvm.v1" /* WebSocket subprotocol */

/* Bounds, in bytes; whatever is longer is refused. */
#define PROTOCOL_MAX_TOKEN 256
#define PROTOCOL_MAX_REQUEST (16 * 1024)  /* body of a request */
#define PROTOCOL_MAX_FRAME (64 * 1024)	  /* of the channel */
#define PROTOCOL_MAX_ANSWER (1024 * 1024) /* body of an answer: env and repos */

/* Calls; in bytes */
#define PROTOCOL_CALLS "/v1/sessions/%s/calls"
#define PROTOCOL_MAX_HEADER (96 * 1024)	  /* of a message: env may be 64 kB */
#define PROTOCOL_MAX_CHUNK (1024 * 1024)  /* bytes of a message, beside its header */
#define PROTOCOL_MAX_PART (256 * 1024)	  /* the same, of a command's input or output */
#define PROTOCOL_MAX_COMMAND (120 * 1024) /* text: what Linux takes as one argument */
#define PROTOCOL_MAX_MESSAGE (4 + PROTOCOL_MAX_HEADER + PROTOCOL_MAX_CHUNK)
#define PROTOCOL_MAX_WAIT_MS 20000	 /* wait_ms */
#define PROTOCOL_CALL_GRACE_MS 10000 /* an answer takes no longer than wait_ms and this */
#define PROTOCOL_CALLS_UNDER_WAY 256 /* of one session */

/* What may become of a call; the runtime's words for it */
#define CALL_INVALID "invalid"		 /* the message makes no sense */
#define CALL_FORGOTTEN "forgotten"	 /* start: it may have run before, and nobody knows */
#define CALL_NO_COMMAND "no_command" /* no such command, or it is not remembered any more */
#define CALL_NO_FILE "no_file"		 /* ENOENT, ENOTDIR */
#define CALL_DENIED "denied"		 /* EACCES, EPERM, EROFS */
#define CALL_WRONG_FILE "wrong_file" /* a directory, a device, an unsafe archive */
#define CALL_NO_SPACE "no_space"	 /* ENOSPC, EDQUOT, ENOMEM */
#define CALL_BUSY "busy"			 /* too many commands or files under way */
#define CALL_FAILED "failed"		 /* whatever else; message says it */

/* WebSocket close codes of our own */
#define PROTOCOL_CLOSE_UNKNOWN 4401	 /* unknown token */
#define PROTOCOL_CLOSE_REPLACED 4409 /* a newer channel of the same session has taken over */
#define PROTOCOL_CLOSE_GONE 4410	 /* the session has ended */
#define PROTOCOL_CLOSE_AWAY 4503	 /* the database is away, or the gateway ends: come again */

/* The cable between a VM's virtio port and a gateway: see common/mux.h */
#define PROTOCOL_CABLE_VERSION 3
#define PROTOCOL_CABLE_STREAMS 16 /* of one VM at once, numbered from 0 */
#define PROTOCOL_CABLE_WINDOW                                                                      \
	(256 * 1024)					 /* bytes of a stream under way or not yet taken, each way */
#define PROTOCOL_CABLE_PAYLOAD 16384 /* bytes of a stream in one frame */
#ifndef PROTOCOL_CABLE_PIECE		 /* the fuzzer's are small, so that it gets somewhere */
#define PROTOCOL_CABLE_PIECE 131072	 /* bytes of a message in one piece */
#endif

#define PROTOCOL_CABLE_END 0xc0		  /* ends a frame */
#define PROTOCOL_CABLE_ESCAPE 0xdb	  /* in a frame: these two in place of END */
#define PROTOCOL_CABLE_IS_END 0xdc	  /* ESCAPE IS_END stands for END */
#define PROTOCOL_CABLE_IS_ESCAPE 0xdd /* ESCAPE IS_ESCAPE stands for ESCAPE */

#define PROTOCOL_CABLE_MAGIC "agentvm:" /* 8 bytes */
#define PROTOCOL_CABLE_HELLO                                                                       \
	1 /* version, MAGIC, nonce of the sender (8), of the receiver as last heard or 0 (8) */
#define PROTOCOL_CABLE_OPEN 2	 /* stream; the guest only */
#define PROTOCOL_CABLE_DATA 3	 /* stream, bytes */
#define PROTOCOL_CABLE_CREDIT 4	 /* stream, bytes that may be sent in addition (4) */
#define PROTOCOL_CABLE_CLOSE 5	 /* stream */
#define PROTOCOL_CABLE_MESSAGE 6 /* see common/mux.h */

#endif /* AGENTVM_PROTOCOL_H */
