/*-------------------------------------------------------------------------
 *
 * agentvm_test_names.c
 *		Preloaded into a server, makes the name "slow.test" take long to resolve.
 *
 *-------------------------------------------------------------------------
 */
#include <dlfcn.h>
#include <netdb.h>
#include <string.h>
#include <unistd.h>

#define DELAY_S 20

typedef int (*Resolver)(const char *, const char *, const struct addrinfo *, struct addrinfo **);

int
getaddrinfo(const char *restrict name, const char *restrict service,
			const struct addrinfo *restrict hints, struct addrinfo **restrict result)
{
	unsigned int left = DELAY_S;

	if (name == NULL || strcmp(name, "slow.test") != 0)
		return ((Resolver) dlsym(RTLD_NEXT, "getaddrinfo"))(name, service, hints, result);
	while (left > 0)
		left = sleep(left);
	return EAI_AGAIN;
}
