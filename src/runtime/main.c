/*-------------------------------------------------------------------------
 *
 * main.c
 *		agentvm-runtime: what speaks for a VM, from inside it.
 *
 * One static binary, one thread, one loop.  It reports for duty, gives signs of
 * life, and powers the machine off when its time has come or nobody answers any
 * more.  It may be the machine's PID 1.
 *
 *-------------------------------------------------------------------------
 */
#include <getopt.h>
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "../common/log.h"
#include "child.h"
#include "command.h"
#include "deadman.h"
#include "link.h"
#include "loop.h"
#include "power.h"
#include "relay.h"
#include "session.h"
#include "settings.h"
#include "state.h"
#include "tar.h"
#include "transfer.h"

#ifndef AGENTVM_VERSION
#define AGENTVM_VERSION "unknown"
#endif

/* allocations of so much go back to the system when they are freed; no message of a call is one */
#define BIG (2 * 1024 * 1024)
#define DEFAULT_CONFIG "/etc/agentvm/runtime.env"

static void
print_help(void)
{
	printf("agentvm-runtime speaks for a VM from inside it: it reports for duty, sends heartbeats, "
		   "and "
		   "powers\nthe VM off after its deadline or without control plane.\n\n"
		   "Usage: agentvm-runtime [OPTION]...\n\n"
		   "  --config=FILE\n        the settings (default: " DEFAULT_CONFIG ")\n"
		   "  --check\n        verify the settings, say what is wrong, and exit\n"
		   "  --tar-create=DIR FILE\n"
		   "        write what is in a directory into a new tar archive\n"
		   "  --tar-extract=DIR FILE\n"
		   "        unpack a tar archive, in gzip or not, unless it leads out of DIR; remove it\n"
		   "  --help\n        this text\n"
		   "  --version\n        the version\n\n"
		   "The file of settings has lines KEY=VALUE, nothing quoted, and mode 0600:\n\n");
	settings_help();
	printf("\nExit codes: 0 the session has ended, or SIGTERM; 1 it could not bootstrap; 2 bad "
		   "settings.\nAs PID 1 it mounts /proc, /sys, /dev and /run, and powers off in place of "
		   "exiting.\n");
	printf("Exit codes of --tar-...: 0 done; 2 DIR is none; 3 the archive is unsafe, 4 it is none, "
		   "and with\neither nothing has been unpacked; 5 the disk is full; 1 anything else.\n");
}

/* As PID 1 there is nowhere to return to. */
static int
leave(int code)
{
	if (getpid() == 1)
		power_off_now();
	return code;
}

static int
refuse(const char *problem)
{
	fprintf(stderr, "agentvm-runtime: %s\n", problem);
	return leave(2);
}

static void
terminate(void)
{
	log_line(LOG_LEVEL_INFO, "ending, as asked", NULL);
	loop_stop(0);
}

int
main(int argc, char **argv)
{
	static const struct option longs[] = {{"config", required_argument, NULL, 'c'},
										  {"check", no_argument, NULL, 'k'},
										  {"tar-create", required_argument, NULL, 't'},
										  {"tar-extract", required_argument, NULL, 'x'},
										  {"help", no_argument, NULL, 'h'},
										  {"version", no_argument, NULL, 'v'},
										  {NULL, 0, NULL, 0}};
	static Settings settings;
	static State state;
	const struct rlimit no_core = {0, 0};
	const char *config = DEFAULT_CONFIG;
	const char *problem;
	const char *directory = NULL;
	int (*tar)(const char *directory, const char *file) = NULL;
	bool check = false;
	int found, code;

	/* the kernel hands PID 1 whatever it does not understand itself */
	opterr = getpid() != 1;
	while ((found = getopt_long(argc, argv, "", longs, NULL)) != -1)
	{
		switch (found)
		{
			case 'c':
				config = optarg;
				break;
			case 'k':
				check = true;
				break;
			case 't':
			case 'x':
				tar = found == 't' ? tar_create : tar_extract;
				directory = optarg;
				break;
			case 'h':
				print_help();
				return 0;
			case 'v':
				printf("agentvm-runtime %s\n", AGENTVM_VERSION);
				return 0;
			default:
				if (getpid() != 1)
					return refuse("try --help");
		}
	}
	if (tar != NULL && getpid() != 1)
		return optind == argc - 1
				   ? tar(directory, argv[optind])
				   : refuse("--tar-create and --tar-extract need a FILE; try --help");
	if (optind < argc && getpid() != 1)
		return refuse("there are no arguments but options; try --help");

	(void) setrlimit(RLIMIT_CORE, &no_core); /* it would hold the tokens */
	/* they would grow with what is freed; what is smaller goes back a while later: call.c */
	(void) mallopt(M_MMAP_THRESHOLD, BIG);
	(void) mallopt(M_TRIM_THRESHOLD, 4 * BIG);
	if (getpid() == 1)
		power_setup_init();
	problem = settings_read(&settings, config);
	if (problem == NULL)
		problem = link_setup(&settings);
	if (problem != NULL)
		return refuse(problem);
	if (check)
	{
		printf("ok\n");
		return 0;
	}
	problem = state_open(&state, &settings);
	if (problem != NULL)
		return refuse(problem);
	transfer_setup(&settings);
	if (!child_setup(terminate) || !deadman_start(&settings, &state) || !relay_start(&settings))
		return leave(1);
	session_start(&settings, &state);
	code = loop_run();
	command_kill_all();
	child_kill_all();
	loop_destroy();
	log_line(LOG_LEVEL_INFO, "ended", NULL);
	return leave(code);
}
