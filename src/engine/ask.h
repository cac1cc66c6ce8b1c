/*-------------------------------------------------------------------------
 *
 * ask.h
 *		A read-only question to a provider.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ENGINE_ASK_H
#define AGENTVM_ENGINE_ASK_H

#include "postgres.h"

#include "engine/login.h"
#include "engine/session_row.h"
#include "providers/provider.h"
#include "utils/jsonb.h"

/*
 * Run OP_INSPECT for a session, or OP_CHECK for a team ("row" is NULL), and
 * return the provider's answer, palloc'd.  Outside a db scope.  Every wait is
 * interruptible.  A refusal raises AV001, AV002, AV003 or AV004 with the
 * provider's code and message, secrets redacted; but OP_CHECK of a placed provider
 * asks each enabled host and tells of all: {"ok": ..., "hosts": {"name": {...}}}.
 */
extern Jsonb *provider_ask(ProviderOp op, const char *team_id, const char *provider_name,
						   Jsonb *options, const SessionRow *row);

/*
 * Fetch a login that is wanted with calls from this backend.  Returns when it is over,
 * however that was.  Outside a db scope; every wait is interruptible.
 */
extern void ask_fetch_login(const LoginRef *ref);

#endif /* AGENTVM_ENGINE_ASK_H */
