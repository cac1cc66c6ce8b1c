/*-------------------------------------------------------------------------
 *
 * main.c
 *		agentvm-gateway: the door that VMs knock on.
 *
 * A process of its own, apart from PostgreSQL, because a parser that faces the
 * network does not belong where shared buffers are mapped.  One libuv loop:
 * libwebsockets and libpq live on it, and nothing but connecting to the database is
 * done on another thread.  It keeps nothing that must survive; run as many as you
 * like.
 *
 *-------------------------------------------------------------------------
 */
#include <malloc.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <systemd/sd-daemon.h>
#include <time.h>
#include <unistd.h>
#include <uv.h>

#include "database.h"
#include "../common/log.h"
#include "options.h"
#include "server.h"

#define TICK_MS 100
#define WATCHDOG_TICKS 50
#define MAX_FREE (16 * 1024 * 1024) /* bytes of memory that are kept for the next calls */

typedef struct Gateway
{
	uv_loop_t loop;
	Options options;
	Server *server;
	uv_timer_t tick;
	uv_signal_t hangup, terminate, interrupt;
	uint64_t end_by; /* 0: not ending */
	unsigned ticks;
} Gateway;

static void
on_signal(uv_signal_t *signal, int number)
{
	Gateway *gateway = signal->data;

	if (number == SIGHUP)
	{
		server_reload(gateway->server);
		return;
	}
	if (gateway->end_by != 0)
	{
		uv_stop(&gateway->loop); /* asked twice */
		return;
	}
	log_line(LOG_LEVEL_INFO, "draining", NULL);
	sd_notify(0, "STOPPING=1");
	gateway->end_by = uv_now(&gateway->loop) + (uint64_t) gateway->options.drain_s * 1000;
	server_drain(gateway->server);
}

static void
on_tick(uv_timer_t *timer)
{
	Gateway *gateway = timer->data;

	if (++gateway->ticks % 600 == 0)
		server_tick(gateway->server);
	if (gateway->ticks % WATCHDOG_TICKS == 0)
		sd_notify(0, "WATCHDOG=1");
	if (gateway->end_by != 0 &&
		(server_is_idle(gateway->server) || uv_now(&gateway->loop) >= gateway->end_by))
		uv_stop(&gateway->loop);
}

static void
watch_signal(Gateway *gateway, uv_signal_t *signal, int number)
{
	uv_signal_init(&gateway->loop, signal);
	signal->data = gateway;
	uv_signal_start(signal, on_signal, number);
}

/* Make room for as many descriptors as there may be connections, or the other way round. */
static const char *
fit_descriptors(Options *options)
{
	static char problem[256];
	char limit[32], wanted[32], may[32];
	struct rlimit files;
	int connections;

	getrlimit(RLIMIT_NOFILE, &files);
	if (files.rlim_cur < files.rlim_max)
	{
		files.rlim_cur = files.rlim_max;
		(void) setrlimit(RLIMIT_NOFILE, &files);
		getrlimit(RLIMIT_NOFILE, &files);
	}
	connections = server_max_connections(options, files.rlim_cur);
	if (connections >= options->max_connections)
		return NULL;
	snprintf(limit, sizeof(limit), "%llu", (unsigned long long) files.rlim_cur);
	if (connections < MIN_CONNECTIONS)
	{
		snprintf(problem, sizeof(problem),
				 "too few descriptors: the limit of open files (ulimit -n) is %s, of which %d "
				 "connections remain; there should be %d",
				 limit, connections < 0 ? 0 : connections, options->max_connections);
		return problem;
	}
	snprintf(wanted, sizeof(wanted), "%d", options->max_connections);
	snprintf(may, sizeof(may), "%d", connections);
	log_line(LOG_LEVEL_WARNING, "fewer connections than --max-connections: too few descriptors",
			 "max-connections", wanted, "open-files-limit", limit, "connections", may, NULL);
	options->max_connections = connections;
	return NULL;
}

static int
check(const Options *options)
{
	const char *sockets = options_vm_sockets_problem(options);
	char *problem;

	if (sockets != NULL)
	{
		fprintf(stderr, "agentvm-gateway: %s\n", sockets);
		return 1;
	}
	problem = database_problem(options->database, options->name);
	if (problem != NULL)
	{
		fprintf(stderr, "agentvm-gateway: database: %s", problem);
		free(problem);
		return 1;
	}
	printf("ok\n");
	return 0;
}

int
main(int argc, char **argv)
{
	static Gateway gateway; /* libuv's handles must not move */
	const struct rlimit no_core = {0, 0};
	const char *problem;

	(void) setrlimit(RLIMIT_CORE, &no_core); /* it would hold tokens */
	/* parts of files come and go, and new pages are dear */
	(void) mallopt(M_MMAP_THRESHOLD, MAX_FREE);
	(void) mallopt(M_TRIM_THRESHOLD, MAX_FREE);
	options_parse(&gateway.options, argc, argv);
	log_set_level((LogLevel) gateway.options.log_level);
	problem = options_problem(&gateway.options);
	if (problem == NULL)
		problem = fit_descriptors(&gateway.options);
	if (problem != NULL)
	{
		fprintf(stderr, "agentvm-gateway: %s\n", problem);
		return 2;
	}
	if (gateway.options.check)
		return check(&gateway.options);

	srandom((unsigned) (time(NULL) ^ getpid()));
	signal(SIGPIPE, SIG_IGN);
	uv_loop_init(&gateway.loop);
	gateway.server = server_create(&gateway.loop, &gateway.options);
	if (gateway.server == NULL)
		return 1;
	watch_signal(&gateway, &gateway.hangup, SIGHUP);
	watch_signal(&gateway, &gateway.terminate, SIGTERM);
	watch_signal(&gateway, &gateway.interrupt, SIGINT);
	uv_timer_init(&gateway.loop, &gateway.tick);
	gateway.tick.data = &gateway;
	uv_timer_start(&gateway.tick, on_tick, TICK_MS, TICK_MS);
	log_line(LOG_LEVEL_INFO, "listening", "address", gateway.options.listen, "tls",
			 gateway.options.tls_cert ? "yes" : "no", NULL);
	sd_notify(0, "READY=1");

	uv_run(&gateway.loop, UV_RUN_DEFAULT);
	server_destroy(gateway.server);
	log_line(LOG_LEVEL_INFO, "ended", NULL);
	_exit(0); /* exit() would wait for a thread that may still look for the database's host */
}
