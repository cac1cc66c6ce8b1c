/*-------------------------------------------------------------------------
 *
 * deadman.h
 *		The machine's own end: after its deadline, or without control plane for too long.
 *
 *-------------------------------------------------------------------------
 */
#ifndef RUNTIME_DEADMAN_H
#define RUNTIME_DEADMAN_H

#include "settings.h"
#include "state.h"

/*
 * Begin to watch, with the times that an earlier process of this boot has left.
 * Settings and state must stay; what the state says of grace and allowance is read
 * each time.  Returns false, having logged why.
 */
extern bool deadman_start(const Settings *settings, const State *state);

/* The server's clock, in ms since 1970, as it has just said itself; or NO_TIME if it has not. */
extern void deadman_clock(int64_t date);

/* The control plane has acknowledged us and has named the deadline, in ms since 1970. */
extern void deadman_contact(int64_t deadline);

/* Whether the machine is on its way down. */
extern bool deadman_has_struck(void);

#endif /* RUNTIME_DEADMAN_H */
