/*-------------------------------------------------------------------------
 *
 * repos.h
 *		The session's repositories: cloned with git, one after the other.
 *
 *-------------------------------------------------------------------------
 */
#ifndef RUNTIME_REPOS_H
#define RUNTIME_REPOS_H

#include <jansson.h>

#include "settings.h"

/*
 * Begin to clone what is not there yet: "repos" is an array of {url, ref, path},
 * "env" the environment for git.  Failures are logged and nothing else.  The settings
 * must stay.
 */
extern void repos_clone(const Settings *settings, json_t *repos, json_t *env);

#endif /* RUNTIME_REPOS_H */
