/*-------------------------------------------------------------------------
 *
 * checks.h
 *		What only the room "team" shares: arguments and conditions.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_TEAM_CHECKS_H
#define AGENTVM_TEAM_CHECKS_H

#include "postgres.h"

#include "fmgr.h"
#include "utils/jsonb.h"

/* Raise 22004 when an argument (from 0) is NULL. */
extern void require_argument(FunctionCallInfo fcinfo, int argno, const char *argument);

/* A text argument as an identifier; NULL raises 22004. */
extern char *identifier_argument(FunctionCallInfo fcinfo, int argno, const char *argument);

/* The same, where SQL NULL is allowed and becomes NULL. */
extern char *optional_identifier_argument(FunctionCallInfo fcinfo, int argno, const char *argument);

/* An object argument, or '{}' where it is NULL. */
extern Jsonb *object_argument(FunctionCallInfo fcinfo, int argno, const char *argument);

/* Raise 42704 unless the team exists.  Inside a scope. */
extern void require_team_exists(const char *team_id);

/* How many sessions of a team live, with one provider or (NULL) with any.  Inside a scope. */
extern int64 count_live_sessions(const char *team_id, const char *provider);

/* Raise AV012 when a lifetime is above agentvm.max_lifetime_ceiling. */
extern void check_ceiling(int64 seconds, const char *argument);

/* JSON text of a value (strings in quotes, control characters escaped), cut short: for messages. */
extern char *json_excerpt(JsonbValue *value);

#endif /* AGENTVM_TEAM_CHECKS_H */
