/*-------------------------------------------------------------------------
 *
 * cgroup.h
 *		Control groups (version 2) of commands: what they have started, and how many.
 *
 * Each command has one of its own, below one that bounds the number of processes of
 * all of them.  Where there are none, nothing in here does anything.
 *
 *-------------------------------------------------------------------------
 */
#ifndef RUNTIME_CGROUP_H
#define RUNTIME_CGROUP_H

#include <stdbool.h>

/*
 * Begin: as PID 1 below the root, else below the group that we are in, which must be
 * ours alone.  pids_limit bounds the processes of all commands, 0 does not.  Says in
 * the log what cannot be had.
 */
extern void cgroup_setup(int pids_limit);

/* Make a group; returns its directory, open, or -1. */
extern int cgroup_make(const char *name);

/* Send a signal to all in it; returns how many there were, at least. */
extern int cgroup_signal(const char *name, int signal_number);

/* Remove a group; false while there are processes in it. */
extern bool cgroup_remove(const char *name);

/* Remove a group, and leave what processes there are in it to one for all of that kind. */
extern void cgroup_abandon(const char *name);

#endif /* RUNTIME_CGROUP_H */
