/*-------------------------------------------------------------------------
 *
 * session.h
 *		What the runtime is for: bootstrap, then a sign of life now and then.
 *
 *-------------------------------------------------------------------------
 */
#ifndef RUNTIME_SESSION_H
#define RUNTIME_SESSION_H

#include "settings.h"
#include "state.h"

/*
 * Begin, on the loop: with a bootstrap, or where an earlier process has left off.  It
 * ends the loop with exit code 0 when the session has ended, and with 1 when it cannot
 * be bootstrapped.  Both arguments must stay.
 */
extern void session_start(Settings *settings, State *state);

#endif /* RUNTIME_SESSION_H */
