/*-------------------------------------------------------------------------
 *
 * main.c
 *		agentvm-gateway: the door that VMs knock on.
 *
 * A process of its own, apart from PostgreSQL, because a parser that faces the
 * network does not belong where shared buffers are mapped.  One thread, one
 * libuv loop: libwebsockets and libpq live on it.  It keeps nothing that must
 * survive; run as many as you like.
 *
 *-------------------------------------------------------------------------
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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
	const char *problem;

	options_parse(&gateway.options, argc, argv);
	log_set_level((LogLevel) gateway.options.log_level);
	problem = options_problem(&gateway.options);
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
	return 0;
}
