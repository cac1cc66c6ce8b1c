/*-------------------------------------------------------------------------
 *
 * resolve.h
 *		Addresses of a host name, by c-ares: libc's own look-up needs shared libraries.
 *
 *-------------------------------------------------------------------------
 */
#ifndef RUNTIME_RESOLVE_H
#define RUNTIME_RESOLVE_H

#define MAX_ADDRESSES 8
#define ADDRESS_LEN 46 /* INET6_ADDRSTRLEN */

typedef struct Addresses
{
	int count;
	char text[MAX_ADDRESSES][ADDRESS_LEN];
} Addresses;

typedef struct Resolve Resolve;

/* What came of it: addresses->count is 0 when "problem" is not NULL. */
typedef void (*Resolved)(void *arg, const Addresses *addresses, const char *problem);

/*
 * Look a name up in /etc/hosts and the servers of /etc/resolv.conf, both read
 * anew.  "done" is called later, once, unless resolve_cancel() is called first.
 */
extern Resolve *resolve_start(const char *host, Resolved done, void *arg);
extern void resolve_cancel(Resolve *resolve);

#endif /* RUNTIME_RESOLVE_H */
