/*-------------------------------------------------------------------------
 *
 * command_row.h
 *		Rows of agentvm.command, and how they end.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ENGINE_COMMAND_ROW_H
#define AGENTVM_ENGINE_COMMAND_ROW_H

#include "agentvm.h"

#include "utils/jsonb.h"
#include "utils/uuid.h"

/* What a statement that deletes rows "c" returns, for commands_log_ends(). */
#define COMMAND_ENDED "c.session_id, c.command_id, c.kind, c.role, c.team_id, c.started_at"

/*
 * Log the ends of the rows that the last statement has returned, with this detail
 * and what the rows say; returns how many.  is_known: so is the time it took, by
 * the rows if not by the detail.  Inside a db scope.
 */
extern uint64 commands_log_ends(Jsonb *detail, bool is_known);

/*
 * The session has ended, or with NULL, all those that have, or are gone: what is
 * left of their commands is deleted and logged with {"outcome": "unknown"}, except
 * for what somebody else has locked.  Inside a db scope.
 */
extern void commands_end(const pg_uuid_t *session_id);

#endif /* AGENTVM_ENGINE_COMMAND_ROW_H */
