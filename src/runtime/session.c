/*-------------------------------------------------------------------------
 *
 * session.c
 *		What the runtime is for: bootstrap, then a sign of life now and then.
 *
 * Heartbeats go over the channel while there is one, else by POST.  A heartbeat
 * that the channel does not acknowledge in time goes by POST, too: if that is
 * taken, the channel is to blame and is made anew; if not, the control plane is
 * away, and the channel may stay.
 *
 * A warm VM has neither environment nor repositories until somebody has taken it.  The
 * gateway says when, but what it says may be lost.  So we ask on each new channel,
 * when the deadline has moved, and when a call has come; and calls are held back until we
 * have them.
 *
 *-------------------------------------------------------------------------
 */
#include "session.h"

#include <jansson.h>
#include <limits.h>
#include <openssl/crypto.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../common/log.h"
#include "../protocol.h"
#include "answer.h"
#include "call.h"
#include "command.h"
#include "deadman.h"
#include "files.h"
#include "link.h"
#include "loop.h"
#include "repos.h"

#ifndef AGENTVM_VERSION
#define AGENTVM_VERSION "unknown"
#endif

#define MAX_STORED (1024 * 1024) /* env.json, repos.json */
#define HYDRATE_TRIES 5

static Settings *settings;
static State *state;

static Link *request; /* bootstrap or heartbeat under way */
static int tries;
static Timer next_try;

static Link *channel;
static bool channel_is_known; /* "hello" has come */
static int64_t channel_backoff_ms;
static Timer channel_retry;

static Timer beat_timer;
static Timer ack_timer; /* set while a beat on the channel is not acknowledged */
static int64_t beat_backoff_ms;
static bool has_beaten;

static Link *hydration;
static bool hydrate_again; /* there was another reason to ask meanwhile */
static int hydrate_tries;  /* to take over what has come */
static const char *hydrate_problem;
static int64_t hydrate_backoff_ms;
static Timer hydrate_timer;
static int64_t last_deadline = NO_TIME;

static void bootstrap(void *arg);
static void hydrate(void *arg);
static void beat(void *arg);
static void open_channel(void *arg);

/* Twice as long the next time. */
static int64_t
back_off(int64_t *backoff)
{
	int64_t ms = *backoff;

	*backoff = ms * 2 < settings->backoff_max_ms ? ms * 2 : settings->backoff_max_ms;
	return jittered(ms);
}

static void
session_is_gone(void)
{
	log_line(LOG_LEVEL_INFO, "the session has ended", "session",
			 state->session_id[0] != '\0' ? state->session_id : NULL, NULL);
	loop_stop(0);
}

/* ---- heartbeats ---- */

static void
acknowledged(int64_t deadline)
{
	if (!has_beaten)
		log_line(LOG_LEVEL_INFO, "first heartbeat acknowledged", "by",
				 channel_is_known ? "channel" : "POST", NULL);
	has_beaten = true;
	beat_backoff_ms = settings->backoff_min_ms;
	timer_stop(&ack_timer);
	deadman_contact(deadline);
	timer_set(&beat_timer, jittered(state->heartbeat_interval_ms), beat, NULL);
	if (deadline != last_deadline)
		hydrate(NULL);
	last_deadline = deadline;
}

static void
try_to_beat_again(int64_t at_least_ms)
{
	int64_t ms = back_off(&beat_backoff_ms);

	if (ms > state->heartbeat_interval_ms)
		ms = jittered(state->heartbeat_interval_ms);
	if (ms < at_least_ms)
		ms = at_least_ms + jittered(settings->backoff_min_ms);
	timer_set(&beat_timer, ms, beat, NULL);
}

static void
on_heartbeat(void *arg, const Answer *answer)
{
	int64_t deadline;

	request = NULL;
	deadman_clock(answer->date);
	if (answer->status == 410)
	{
		session_is_gone();
		return;
	}
	if (answer->status == 200)
	{
		deadline = answer_deadline(answer->body, answer->len);
		if (deadline != NO_TIME)
		{
			if (channel_is_known && timer_is_set(&ack_timer))
			{
				log_line(LOG_LEVEL_INFO, "the channel does not answer and is made anew", NULL);
				command_set_channel(NULL);
				link_drop(channel);
				channel = NULL;
				channel_is_known = false;
				timer_set(&channel_retry, back_off(&channel_backoff_ms), open_channel, NULL);
			}
			acknowledged(deadline);
			return;
		}
		log_line(LOG_LEVEL_WARNING, "heartbeat: the answer makes no sense", NULL);
	}
	else
	{
		char status[16];

		snprintf(status, sizeof(status), "%d", answer->status);
		log_line(LOG_LEVEL_WARNING, "heartbeat was not taken", "status",
				 answer->status ? status : NULL, "reason", answer->status ? NULL : answer->problem,
				 NULL);
	}
	timer_stop(&ack_timer);
	try_to_beat_again(answer->retry_after_ms);
}

static void
beat_by_post(void *arg)
{
	if (request == NULL && !deadman_has_struck())
		request = link_post(PROTOCOL_HEARTBEAT, state->session_token, "{}", on_heartbeat, NULL);
}

static void
beat_unanswered(void *arg)
{
	timer_set(&ack_timer, INT64_C(3600000), beat_by_post, NULL); /* still not acknowledged */
	beat_by_post(NULL);
}

static void
beat(void *arg)
{
	timer_stop(&beat_timer);
	if (channel_is_known && link_send(channel, "{\"type\": \"heartbeat\"}"))
		timer_set(&ack_timer, settings->http_timeout_ms, beat_unanswered, NULL);
	else
		beat_by_post(NULL);
}

/* ---- the channel ---- */

static void
on_opened(void *arg, int64_t date)
{
	deadman_clock(date);
}

static void
on_frame(void *arg, const char *text, size_t len)
{
	Frame frame;

	switch (answer_frame(text, len, &frame))
	{
		case FRAME_HELLO:
			if (channel_is_known)
				break;
			channel_is_known = true;
			channel_backoff_ms = settings->backoff_min_ms;
			log_line(LOG_LEVEL_INFO, "channel is open", NULL);
			link_use_cable(channel);
			command_set_channel(channel);
			hydrate(NULL);
			if (!has_beaten && request == NULL)
				beat(NULL);
			break;
		case FRAME_DEADLINE:
			acknowledged(frame.deadline);
			break;
		case FRAME_NOTED:
			command_noted(frame.command);
			break;
		case FRAME_CLAIMED:
			hydrate(NULL);
			break;
		case FRAME_GONE:
			session_is_gone();
			break;
		case FRAME_BAD:
			log_line(LOG_LEVEL_WARNING, "frame makes no sense and is ignored", NULL);
			break;
		case FRAME_UNKNOWN:
			break; /* for later versions */
	}
}

/* A call; before it is known that the session is ours nobody has any to make. */
static void
on_call(void *arg, const char *bytes, size_t len)
{
	if (!channel_is_known)
		return;
	call_take(channel, bytes, len);
	hydrate(NULL);
}

static void
on_sent(void *arg)
{
	command_tell();
	call_send();
}

static void
on_closed(void *arg, int code, const char *why)
{
	bool was_known = channel_is_known;
	char text[16];

	command_set_channel(NULL);
	channel = NULL;
	channel_is_known = false;
	if (code == PROTOCOL_CLOSE_GONE)
	{
		session_is_gone();
		return;
	}
	snprintf(text, sizeof(text), "%d", code);
	log_line(was_known ? LOG_LEVEL_INFO : LOG_LEVEL_WARNING,
			 was_known ? "channel was closed" : "channel cannot be had", "code",
			 code != 0 ? text : NULL, "reason", why, NULL);
	timer_set(&channel_retry, back_off(&channel_backoff_ms), open_channel, NULL);
	/* what the channel has not acknowledged, or has kept waiting, goes the other way */
	if (timer_is_set(&ack_timer) || !has_beaten)
	{
		timer_stop(&ack_timer);
		if (!timer_is_set(&beat_timer))
			beat_by_post(NULL);
	}
}

static void
open_channel(void *arg)
{
	static const ChannelEvents events = {on_opened, on_frame, on_call, on_sent, on_closed};

	if (channel == NULL && !deadman_has_struck())
		channel = link_channel(state->channel, state->session_token, &events, NULL);
}

static void
begin_to_beat(void)
{
	log_line(LOG_LEVEL_INFO, "on duty", "session", state->session_id, "mode", settings->mode, NULL);
	beat_backoff_ms = channel_backoff_ms = hydrate_backoff_ms = settings->backoff_min_ms;
	if (!state->hydrated)
		call_hold();
	open_channel(NULL); /* it beats when it is open, or when it cannot be had */
}

/* ---- hydration of a warm VM ---- */

static bool
keep_documents(const BootAnswer *boot)
{
	return state_store(settings, "env.json", boot->env) &&
		   state_store(settings, "repos.json", boot->repos);
}

/* Take over what has come; returns what keeps us from it, or NULL. */
static const char *
take_over(const Answer *answer)
{
	BootAnswer boot;
	const char *problem = answer_boot(answer->body, answer->len, &boot);

	if (problem != NULL)
		return problem;
	if (!keep_documents(&boot))
		problem = "env.json or repos.json cannot be stored";
	else
	{
		state->hydrated = true;
		if (!state_save(state, settings))
		{
			state->hydrated = false;
			problem = "session.json cannot be stored";
		}
	}
	if (problem == NULL)
	{
		log_line(LOG_LEVEL_INFO, "hydrated", "session", state->session_id, NULL);
		deadman_contact(boot.deadline);
		repos_clone(settings, boot.repos, boot.env);
		call_release();
	}
	json_decref(boot.root);
	return problem;
}

static void
on_hydrated(void *arg, const Answer *answer)
{
	const char *problem = NULL;
	char status[32];

	hydration = NULL;
	deadman_clock(answer->date);
	if (answer->status == 410)
	{
		session_is_gone();
		return;
	}
	if (answer->status == 409)
	{
		/* nobody has taken us, or had not when the database looked */
		hydrate_backoff_ms = settings->backoff_min_ms;
		if (hydrate_again)
			hydrate(NULL);
		return;
	}
	if (answer->status == 200 && hydrate_problem != NULL)
		return; /* the end follows */
	if (answer->status == 200)
	{
		problem = take_over(answer);
		if (problem == NULL)
			return;
		if (++hydrate_tries >= HYDRATE_TRIES)
			hydrate_problem = problem;
	}
	else
		snprintf(status, sizeof(status), "status %d", answer->status);
	log_line(LOG_LEVEL_WARNING, "hydration has not worked", "reason",
			 problem != NULL	   ? problem
			 : answer->status != 0 ? status
								   : answer->problem,
			 NULL);
	timer_set(&hydrate_timer, answer->retry_after_ms + back_off(&hydrate_backoff_ms), hydrate,
			  NULL);
}

/* Ask for environment and repositories; or say that the VM cannot take them over. */
static void
hydrate(void *arg)
{
	json_t *body;
	char *text;

	if (state->hydrated || deadman_has_struck())
		return;
	hydrate_again = hydration != NULL;
	if (hydration != NULL)
		return;
	timer_stop(&hydrate_timer);
	body = hydrate_problem != NULL ? json_pack("{s:s}", "problem", hydrate_problem) : json_object();
	text = json_dumps(body, JSON_COMPACT);
	hydration = link_post(PROTOCOL_HYDRATE, state->session_token, text, on_hydrated, NULL);
	free(text);
	json_decref(body);
}

/* ---- bootstrap ---- */

static void
clone_stored(void)
{
	json_t *documents[2];
	static const char *const names[] = {"repos.json", "env.json"};
	int i;

	for (i = 0; i < 2; i++)
	{
		char path[PATH_MAX];
		size_t len = 0;
		char *text;

		snprintf(path, sizeof(path), "%s/%s", settings->state_dir, names[i]);
		text = file_read(path, MAX_STORED, &len);
		documents[i] = text ? json_loadb(text, len, 0, NULL) : NULL;
		if (text != NULL)
			OPENSSL_cleanse(text, len);
		free(text);
	}
	if (json_is_array(documents[0]) && json_is_object(documents[1]))
		repos_clone(settings, documents[0], documents[1]);
	json_decref(documents[0]);
	json_decref(documents[1]);
}

static void
try_again(const char *problem, int64_t at_least_ms)
{
	char text[32];
	int64_t ms = jittered(settings->bootstrap_interval_ms);

	snprintf(text, sizeof(text), "%d of %d", tries, settings->bootstrap_tries);
	log_line(LOG_LEVEL_WARNING, "bootstrap has not worked", "try", text, "reason", problem, NULL);
	if (tries >= settings->bootstrap_tries)
	{
		log_line(LOG_LEVEL_ERROR, "bootstrap is given up", NULL);
		loop_stop(1);
		return;
	}
	timer_set(&next_try, ms > at_least_ms ? ms : at_least_ms, bootstrap, NULL);
}

/* The answer is kept before the token is erased: a crash in between repeats the bootstrap. */
static bool
keep(const BootAnswer *boot)
{
	state->hydrated = strcmp(settings->mode, "warm") != 0;
	if (state->hydrated && !keep_documents(boot))
		return false;
	snprintf(state->session_id, sizeof(state->session_id), "%s", boot->session_id);
	snprintf(state->channel, sizeof(state->channel), "%s", boot->channel);
	state->heartbeat_interval_ms = boot->heartbeat_interval_ms;
	state->deadline_grace_ms = boot->deadline_grace_ms;
	state->deadman_allowance_ms = boot->deadman_allowance_ms;
	if (!state_save(state, settings))
	{
		state->session_id[0] = '\0';
		return false;
	}
	(void) settings_erase_token(
		settings); /* it is worth nothing any more, whatever becomes of it */
	return true;
}

static void
on_bootstrap(void *arg, const Answer *answer)
{
	BootAnswer boot;
	const char *problem;
	char status[32];

	request = NULL;
	deadman_clock(answer->date);
	if (answer->status == 410)
	{
		session_is_gone();
		return;
	}
	if (answer->status == 401)
	{
		/* no time makes a token known that is not: it has expired, or somebody else has used it */
		log_line(LOG_LEVEL_ERROR, "bootstrap token is refused", "token",
				 log_token(settings->bootstrap_token), NULL);
		loop_stop(1);
		return;
	}
	if (answer->status != 200)
	{
		snprintf(status, sizeof(status), "status %d", answer->status);
		try_again(answer->status ? status : answer->problem, answer->retry_after_ms);
		return;
	}
	problem = answer_boot(answer->body, answer->len, &boot);
	if (problem != NULL)
	{
		try_again(problem, 0);
		return;
	}
	log_line(LOG_LEVEL_INFO, "bootstrapped", "session", boot.session_id, NULL);
	if (!keep(&boot))
	{
		json_decref(boot.root);
		try_again("its answer cannot be stored", 0);
		return;
	}
	deadman_contact(boot.deadline);
	last_deadline = boot.deadline;
	if (state->hydrated)
		repos_clone(settings, boot.repos, boot.env);
	json_decref(boot.root);
	begin_to_beat();
}

static void
bootstrap(void *arg)
{
	char hostname[HOST_NAME_MAX + 1] = "";
	json_t *body;
	char *text;

	if (deadman_has_struck())
		return;
	tries++;
	(void) gethostname(hostname, sizeof(hostname) - 1);
	body = json_pack("{s:s, s:s, s:s, s:s}", "session_token_sha256", state->session_token_sha256,
					 "boot_id", state->boot_id, "runtime_version", AGENTVM_VERSION, "hostname",
					 hostname);
	text = body ? json_dumps(body, JSON_COMPACT) : NULL;
	if (text == NULL)
		try_again("the host name is no UTF-8", 0);
	else
		request =
			link_post(PROTOCOL_BOOTSTRAP, settings->bootstrap_token, text, on_bootstrap, NULL);
	free(text);
	json_decref(body);
}

void
session_start(Settings *with, State *of)
{
	settings = with;
	state = of;
	command_setup(settings, !state->hydrated);
	if (state->session_id[0] == '\0')
	{
		log_line(LOG_LEVEL_INFO, "bootstrapping", "gateway", settings->gateway_url, "token",
				 log_token(settings->bootstrap_token), NULL);
		bootstrap(NULL);
		return;
	}
	/* an earlier process has done it, perhaps without getting to this */
	(void) settings_erase_token(settings);
	if (state->hydrated)
		clone_stored();
	begin_to_beat();
}
