/*-------------------------------------------------------------------------
 *
 * repos.c
 *		The session's repositories: cloned with git, one after the other.
 *
 * A clone is made beside its place and moved there when it is whole.  What a URL
 * says of user and password goes to git in its environment, as a credential
 * helper for that host only: neither other processes nor .git/config see it.
 *
 *-------------------------------------------------------------------------
 */
#include "repos.h"

#include <errno.h>
#include <ftw.h>
#include <limits.h>
#include <openssl/crypto.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../common/log.h"
#include "child.h"
#include "files.h"

extern char **environ;

typedef enum Step
{
	STEP_CLONE,
	STEP_CHECKOUT
} Step;

typedef struct Clone
{
	char *url; /* without user and password */
	char *user;
	char *password;
	const char *ref; /* NULL: the remote's default */
	char path[PATH_MAX - 16];
	char beside[PATH_MAX]; /* where it grows */
} Clone;

static const Settings *settings;
static json_t *all;
static json_t *environment;
static json_t *taken; /* the places of those that are there, by device and inode */
static size_t next;
static Step step;
static Clone now;

static int
remove_entry(const char *path, const struct stat *status, int flag, struct FTW *at)
{
	return remove(path);
}

/* %41 becomes A. */
static char *
decoded(const char *text, size_t len)
{
	char *plain = malloc(len + 1);
	char *at = plain;
	size_t i;

	for (i = 0; i < len; i++)
	{
		unsigned byte;

		if (text[i] == '%' && i + 2 < len && sscanf(text + i + 1, "%2x", &byte) == 1)
		{
			*at++ = (char) byte;
			i += 2;
		}
		else
			*at++ = text[i];
	}
	*at = '\0';
	return plain;
}

/* https://user:password@host/path, into its parts; other URLs are left as they are. */
static void
split_url(Clone *clone, const char *url)
{
	const char *authority = strstr(url, "://");
	const char *at, *colon;
	size_t scheme;

	if (authority == NULL || strncmp(url, "http", 4) != 0)
	{
		clone->url = strdup(url);
		return;
	}
	authority += 3;
	scheme = (size_t) (authority - url);
	at = authority + strcspn(authority, "/?#");
	while (at > authority && *at != '@')
		at--;
	if (at == authority)
	{
		clone->url = strdup(url);
		return;
	}
	colon = memchr(authority, ':', (size_t) (at - authority));
	clone->user = decoded(authority, (size_t) ((colon ? colon : at) - authority));
	clone->password = colon ? decoded(colon + 1, (size_t) (at - colon - 1)) : strdup("");
	clone->url = malloc(strlen(url) + 1);
	snprintf(clone->url, strlen(url) + 1, "%.*s%s", (int) scheme, url, at + 1);
}

/*
 * Where it goes: its path, or the URL's last part without ".git"; below work_dir
 * unless absolute.  Returns what is wrong with it, or NULL.
 */
static const char *
place(Clone *clone, const char *path)
{
	char name[NAME_MAX + 1];
	size_t len;

	if (path == NULL)
	{
		const char *last;

		len = strlen(clone->url);
		while (len > 0 && clone->url[len - 1] == '/')
			len--;
		for (last = clone->url + len; last > clone->url && strchr("/:", last[-1]) == NULL; last--)
			;
		snprintf(name, sizeof(name), "%.*s", (int) (clone->url + len - last), last);
		len = strlen(name);
		if (len > 4 && strcmp(name + len - 4, ".git") == 0)
			name[len - 4] = '\0';
		path = name;
	}
	if (path[strspn(path, "/")] == '\0')
		return "it names no directory";
	len = (size_t) snprintf(clone->path, sizeof(clone->path), "%s%s%s",
							path[0] == '/' ? "" : settings->work_dir, path[0] == '/' ? "" : "/",
							path);
	if (len >= sizeof(clone->path))
		return "its path is too long";
	while (clone->path[len - 1] == '/')
		clone->path[--len] = '\0';
	snprintf(clone->beside, sizeof(clone->beside), "%s.cloning", clone->path);
	return NULL;
}

/* Whether no earlier one is there, by whatever name. */
static bool
take(const char *path)
{
	struct stat status;
	char key[64];

	if (stat(path, &status) != 0)
		return true;
	snprintf(key, sizeof(key), "%llx %llx", (unsigned long long) status.st_dev,
			 (unsigned long long) status.st_ino);
	if (json_object_get(taken, key) != NULL)
		return false;
	(void) json_object_set_new(taken, key, json_true());
	return true;
}

static bool
has_git(const char *path)
{
	char git[PATH_MAX];

	snprintf(git, sizeof(git), "%s/.git", path);
	return access(git, F_OK) == 0;
}

static void
add(char ***at, const char *name, const char *value)
{
	size_t size = strlen(name) + strlen(value) + 2;

	**at = malloc(size);
	snprintf(*(*at)++, size, "%s=%s", name, value);
}

/* Ours, then the session's, then what git needs to know; malloc'ed. */
static char **
make_environment(const Clone *clone)
{
	size_t count = 16 + json_object_size(environment);
	char **envp, **at, **own;
	const char *key;
	json_t *value;

	for (own = environ; *own != NULL; own++)
		count++;
	envp = at = calloc(count, sizeof(char *));
	for (own = environ; *own != NULL; own++)
	{
		size_t len = strcspn(*own, "=");
		char name[128];

		snprintf(name, sizeof(name), "%.*s", (int) len, *own);
		if (json_object_get(environment, name) == NULL && strncmp(name, "GIT_CONFIG_", 11) != 0)
			*at++ = strdup(*own);
	}
	json_object_foreach(environment, key, value)
	{
		if (strncmp(key, "GIT_CONFIG_", 11) != 0)
			add(&at, key, json_string_value(value));
	}
	add(&at, "GIT_TERMINAL_PROMPT", "0");
	if (clone->user != NULL)
	{
		char key_name[512];
		const char *host = strstr(clone->url, "://") + 3;

		snprintf(key_name, sizeof(key_name), "credential.%.*s.helper",
				 (int) (host + strcspn(host, "/?#") - clone->url), clone->url);
		add(&at, "GIT_CONFIG_COUNT", "1");
		add(&at, "GIT_CONFIG_KEY_0", key_name);
		add(&at, "GIT_CONFIG_VALUE_0",
			"!f() { test \"$1\" = get && printf 'username=%s\\npassword=%s\\n' "
			"\"$AGENTVM_GIT_USER\" \"$AGENTVM_GIT_PASSWORD\"; }; f");
		add(&at, "AGENTVM_GIT_USER", clone->user);
		add(&at, "AGENTVM_GIT_PASSWORD", clone->password);
	}
	return envp;
}

static void on_ended(void *arg, int code, const char *words);

static bool
git(const Clone *clone, char *const *argv)
{
	char **envp = make_environment(clone);
	char **at;
	bool ok = child_start(argv, envp, settings->clone_timeout_ms, on_ended, NULL);

	for (at = envp; *at != NULL; at++)
	{
		OPENSSL_cleanse(*at, strlen(*at));
		free(*at);
	}
	free(envp);
	return ok;
}

static void
forget(Clone *clone)
{
	if (clone->password != NULL)
		OPENSSL_cleanse(clone->password, strlen(clone->password));
	free(clone->url);
	free(clone->user);
	free(clone->password);
	memset(clone, 0, sizeof(*clone));
}

static void
finish(const char *problem, const char *words)
{
	if (problem == NULL && !take(now.path))
		problem = "an earlier one has its path";
	if (problem != NULL)
		log_line(LOG_LEVEL_WARNING, "repository was not cloned", "url", now.url, "reason", problem,
				 "git", words, "path", now.path[0] != '\0' ? now.path : NULL, NULL);
	else
		log_line(LOG_LEVEL_INFO, "repository is there", "url", now.url, "path", now.path, NULL);
	forget(&now);
}

/* Go on to its next step, if any; false: it is finished. */
static bool
go_on(int code, const char *words)
{
	if (code != 0)
		finish(code == 127			? "there is no git"
			   : code == 128 + 9	? "git was killed"
			   : step == STEP_CLONE ? "git clone failed"
									: "git checkout failed",
			   words[0] != '\0' ? words : NULL);
	else if (step == STEP_CLONE && now.ref != NULL)
	{
		char *argv[] = {"git", "-C", now.beside, "checkout", "--quiet", (char *) now.ref,
						"--",  NULL};

		step = STEP_CHECKOUT;
		if (git(&now, argv))
			return true;
		finish("no process for it", NULL);
	}
	else
		finish(rename(now.beside, now.path) != 0 ? strerror(errno) : NULL, NULL);
	return false;
}

/* The same for its first step. */
static bool
begin(json_t *repo)
{
	const char *url = json_string_value(json_object_get(repo, "url"));
	char parent[PATH_MAX];
	struct stat status;
	const char *problem;
	char *clone[] = {"git", "clone", "--quiet", "--", NULL, now.beside, NULL};
	char *whole[] = {"git", "clone", "--quiet", "--no-checkout", "--", NULL, now.beside, NULL};

	split_url(&now, url != NULL ? url : "");
	now.ref = json_string_value(json_object_get(repo, "ref"));
	problem = place(&now, json_string_value(json_object_get(repo, "path")));
	if (problem != NULL || lstat(now.path, &status) == 0)
	{
		if (problem == NULL && !has_git(now.path))
			problem = "its path exists and is no repository";
		finish(problem, NULL);
		return false;
	}
	snprintf(parent, sizeof(parent), "%s", now.path);
	*strrchr(parent, '/') = '\0';
	(void) nftw(now.beside, remove_entry, 16, FTW_DEPTH | FTW_PHYS); /* of a crash */
	if (now.ref != NULL && now.ref[0] == '-')
		problem = "its ref begins with a dash";
	else if (parent[0] != '\0' && !make_directories(parent, 0755))
		problem = strerror(errno);
	else
	{
		step = STEP_CLONE;
		clone[4] = whole[5] = now.url;
		if (git(&now, now.ref != NULL ? whole : clone))
			return true;
		problem = "no process for it";
	}
	finish(problem, NULL);
	return false;
}

static void
begin_next(void)
{
	while (next < json_array_size(all))
	{
		if (begin(json_array_get(all, next++)))
			return;
	}
	json_decref(all);
	json_decref(environment);
	json_decref(taken);
	all = environment = taken = NULL;
}

static void
on_ended(void *arg, int code, const char *words)
{
	if (!go_on(code, words))
		begin_next();
}

void
repos_clone(const Settings *with, json_t *repos, json_t *env)
{
	if (all != NULL)
		return;
	settings = with;
	all = json_incref(repos);
	environment = json_incref(env);
	taken = json_object();
	next = 0;
	begin_next();
}
