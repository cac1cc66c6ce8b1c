/*-------------------------------------------------------------------------
 *
 * question.h
 *		A call of a provider whose library blocks, made for somebody else: a
 *		backend asks, the runner of its database makes the call.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ENGINE_QUESTION_H
#define AGENTVM_ENGINE_QUESTION_H

#include "postgres.h"

#include "engine/shared.h"
#include "net/http.h"

/*
 * The reply to a request of a provider, palloc'd.  Waits for the runner, and for
 * a place when many ask, interruptibly and no longer than request->timeout_ms and
 * a little.  Raises AV009 with a hint where no runner serves the database, AV012
 * when the request has more than QUESTION_SIZE bytes.
 */
extern HttpReply *question_ask(const char *provider, const HttpRequest *request);

/* ---- the runner's side ---- */

/*
 * Take the questions that are asked, and answer those whose calls are done.  After
 * engine_run(), which shares the pool's fd with them.  Outside a transaction.
 */
extern void questions_run(void);

#endif /* AGENTVM_ENGINE_QUESTION_H */
