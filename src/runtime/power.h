/*-------------------------------------------------------------------------
 *
 * power.h
 *		The end of the machine, and its beginning where we are PID 1.
 *
 *-------------------------------------------------------------------------
 */
#ifndef RUNTIME_POWER_H
#define RUNTIME_POWER_H

#include "settings.h"

/* As PID 1: mount what an empty root lacks, and let nothing end us. */
extern void power_setup_init(void);

/*
 * Power the machine off, and try again in other ways until it is off.  Returns at
 * once; the loop must go on.
 */
extern void power_off(const Settings *settings);

/* As PID 1, whose end would be a panic: end all processes, write the disks, and off.  Does not return. */
extern void power_off_now(void) __attribute__((noreturn));

#endif /* RUNTIME_POWER_H */
