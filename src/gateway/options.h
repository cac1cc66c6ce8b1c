/*-------------------------------------------------------------------------
 *
 * options.h
 *		Settings of the gateway: flags, or environment variables of the same names.
 *
 *-------------------------------------------------------------------------
 */
#ifndef GATEWAY_OPTIONS_H
#define GATEWAY_OPTIONS_H

#include <stdbool.h>
#include <sys/socket.h>

#define MAX_VM_SOCKETS 16
#define MIN_CONNECTIONS 10
#define MAX_CONTROL_PATH 100 /* bytes */

typedef struct Options
{
	const char *database; /* libpq connection string */
	const char *name;	  /* gateway_id; application_name of our connections */
	const char *listen;	  /* address to bind, without port */
	int port;
	const char *tls_cert; /* PEM files; NULL: plain HTTP */
	const char *tls_key;
	bool allow_plaintext;						/* plain HTTP on other than loopback addresses */
	const char *vm_sockets[MAX_VM_SOCKETS + 1]; /* directories of the VMs' sockets, up to a NULL */
	const char *control;		 /* unix:PATH or ADDRESS:PORT; NULL: no control listener */
	int max_call_memory;		 /* MiB that calls may take */
	int max_connections;		 /* in all */
	int max_per_address;		 /* connections of one address */
	int request_timeout_s;		 /* for a whole request to arrive */
	int unauthenticated_rate;	 /* refused tokens per address and minute */
	int unauthenticated_lookups; /* a second, of tokens beyond that */
	const char *metrics_from;	 /* networks, with commas between them */
	int drain_s;				 /* for open requests after SIGTERM */
	int log_level;				 /* LogLevel */
	bool check;					 /* only verify the configuration */
} Options;

/*
 * Fill *options from argv, and from AGENTVM_GATEWAY_<FLAG> where a flag is
 * absent.  Prints to stdout and exits with 0 for --help and --version; prints
 * what is wrong to stderr and exits with 2.  The strings live as long as argv
 * and the environment.
 */
extern void options_parse(Options *options, int argc, char **argv);

/*
 * Whether these settings can work: files readable and a pair, address allowed
 * without TLS.  Returns NULL, or a static or malloc'ed text that says what is wrong.
 */
extern const char *options_problem(const Options *options);

/*
 * Take --control apart.  Returns 'u' with the path, 't' with the IP address and its
 * port, 0 when there is none, or -1 when it is neither.  What "address" points to is
 * static or part of the option.
 */
extern int options_control(const Options *options, const char **address, int *port);

/* Whether this client may read /metrics; one of a VM's socket may not. */
extern bool options_metrics_for(const Options *options, const struct sockaddr_storage *client);

/*
 * Whether the VMs' sockets can be got at.  They may come later, and a gateway that
 * runs goes on trying: this is for --check.  Returns as options_problem().
 */
extern const char *options_vm_sockets_problem(const Options *options);

#endif /* GATEWAY_OPTIONS_H */
