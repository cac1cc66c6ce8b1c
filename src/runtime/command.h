/*-------------------------------------------------------------------------
 *
 * command.h
 *		Commands of the session: run once each, remembered for a while.
 *
 *-------------------------------------------------------------------------
 */
#ifndef RUNTIME_COMMAND_H
#define RUNTIME_COMMAND_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

#include "answer.h"
#include "call.h"
#include "link.h"
#include "settings.h"

/*
 * Begin; the settings must stay.  "is_first": no earlier process can have run a
 * command of this session.
 */
extern void command_setup(const Settings *settings, bool is_first);

/* Do a start, input, output or kill; it is answered at once, or waits. */
extern void command_call(Call *call, const CallFrame *said);

/*
 * The answer to a call that can be answered and has none yet: what its command has
 * said, of which *len bytes are to be had by command_copy() at once.  A new reference.
 */
extern json_t *command_answer(Call *call, size_t *len);
extern void command_copy(const Call *call, char *bytes);

/* The call is not under way any more. */
extern void command_let_go(Call *call);

/* A channel is open, or (NULL) there is none: commands whose ends are not noted are told to it. */
extern void command_set_channel(Link *channel);

/* Go on with that, now that a frame has been sent. */
extern void command_tell(void);

/* The end of a command has been noted. */
extern void command_noted(const char *id);

/* Kill what is running, without waiting. */
extern void command_kill_all(void);

#endif /* RUNTIME_COMMAND_H */
