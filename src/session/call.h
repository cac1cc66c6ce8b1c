/*-------------------------------------------------------------------------
 *
 * call.h
 *		Calls to the runtimes in VMs, through the gateways that hold their channels.
 *
 * A Call is the conversation with the runtime of one session, one message at a
 * time; a Calls holds those of a statement, many at once, on one HTTP client.  Who
 * has sent something lets calls_advance() do what can be done, takes from
 * calls_answered() what has come to an end, and sleeps with calls_sleep().
 *
 * A message that does not get through is sent again, the same one, until it does
 * or the time for that is over.  What may become of a call is told by its answer or
 * by its failure; only what is wrong with this server (the key file, memory) and
 * interrupts raise.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_SESSION_CALL_H
#define AGENTVM_SESSION_CALL_H

#include "postgres.h"

#include "session/message.h"
#include "utils/uuid.h"

typedef struct Calls Calls;
typedef struct Call Call;

/* Why there is no answer; texts are in the server's encoding. */
typedef struct CallFailure
{
	int sqlstate;
	char *message;
	char *detail; /* or NULL */
	char *hint;	  /* or NULL */
} CallFailure;

/* What is to be sent; all of it has to stay until the message is answered. */
typedef struct CallMessage
{
	pg_uuid_t command;
	StringInfo header; /* from header_begin() on, without header_finish() */
	const char *bytes; /* what follows the header */
	size_t len;
	int wait_ms;	 /* how long the runtime may wait before it answers */
	bool tells_age;	 /* it is to be logged once: say how long ago it was sent first */
	bool begins;	 /* a command: in the end it may be unknown whether it has */
	bool much_comes; /* the answer is likely to be large */
} CallMessage;

/* Milliseconds of a clock that never jumps. */
extern int64 call_now_ms(void);

/*
 * The calls of a statement, by "role", in a new context below CurrentMemoryContext.
 * When that goes, or with calls_destroy(), whatever is under way is given up at
 * once: its connection is closed, by which the gateway knows.  So it has to be a context
 * that goes with an error.  Raises out of memory.
 */
extern Calls *calls_create(Oid role);
extern void calls_destroy(Calls *calls);

/*
 * A conversation with a session's runtime; "arg" is the caller's.  "what" completes
 * "could not ...", and is copied.  "reach_ms" is for how long a message that does not get
 * through is tried again, 15 s at most.  Lives as long as the Calls.
 */
extern Call *call_create(Calls *calls, const pg_uuid_t *session, const char *what, int64 reach_ms,
						 void *arg);

/* End a conversation and free it; what is under way is given up. */
extern void call_destroy(Call *call);

/*
 * Once something has been sent, or may have been, whose outcome is of interest:
 * when the runtime cannot be reached any more, the failure is "outcome unknown".
 * A message that begins a command does so by itself.
 */
extern void call_outcome_matters(Call *call);

/*
 * Begin to send a message; the answer to the one before must have been taken, and is
 * gone now.  Nothing but a note is made until calls_advance().
 */
extern void call_send(Call *call, const CallMessage *message);

/* Do all that can be done without waiting.  Needs a transaction. */
extern void calls_advance(Calls *calls);

/* A call that has an answer or a failure which has not been taken yet, or NULL. */
extern Call *calls_answered(Calls *calls);

/*
 * Wait until there may be something to do, or until "until" of call_now_ms().
 * Interrupts end it, and so does a client that has gone.
 */
extern void calls_sleep(Calls *calls, int64 until);

extern void *call_arg(const Call *call);
extern const pg_uuid_t *call_session(const Call *call);

/* What came of the last message: its failure or NULL, its answer; both until the next one. */
extern const CallFailure *call_failure(const Call *call);
extern const Answer *call_answer(const Call *call);

/* Whether some try of a message, since the call was made, has come to nothing after it may have been passed on. */
extern bool call_broke(const Call *call);

/* Make an answer that makes no sense the call's failure (58000). */
extern void call_protest(Call *call);

/* Raise a failure. */
pg_noreturn extern void call_raise(const CallFailure *failure);

/* Send a message and wait for its answer, of the only call of a statement; raises failures. */
extern const Answer *call_ask(Call *call, const CallMessage *message);

#endif /* AGENTVM_SESSION_CALL_H */
