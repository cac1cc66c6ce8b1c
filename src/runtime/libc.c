/*-------------------------------------------------------------------------
 *
 * libc.c
 *		What a static binary must not take from libc.
 *
 * These functions load shared libraries of the very libc that was linked, which
 * other machines do not have.  The libraries that we use refer to them, but
 * nothing we do gets there, except for getaddrinfo(), which libwebsockets asks
 * about addresses that resolve.c has found, and iconv_open(), without which
 * libarchive takes names as they are.
 *
 *-------------------------------------------------------------------------
 */
#include <arpa/inet.h>
#include <errno.h>
#include <grp.h>
#include <iconv.h>
#include <netdb.h>
#include <pwd.h>
#include <stdlib.h>
#include <string.h>

int
getaddrinfo(const char *node, const char *service, const struct addrinfo *hints,
			struct addrinfo **result)
{
	struct
	{
		struct addrinfo info;
		struct sockaddr_storage address;
	} *found = calloc(1, sizeof(*found));
	struct sockaddr_in *v4 = (struct sockaddr_in *) &found->address;
	struct sockaddr_in6 *v6 = (struct sockaddr_in6 *) &found->address;

	if (found == NULL)
		return EAI_MEMORY;
	found->info.ai_addr = (struct sockaddr *) &found->address;
	found->info.ai_socktype = SOCK_STREAM;
	if (node != NULL && inet_pton(AF_INET, node, &v4->sin_addr) == 1)
	{
		found->info.ai_family = v4->sin_family = AF_INET;
		found->info.ai_addrlen = sizeof(*v4);
	}
	else if (node != NULL && inet_pton(AF_INET6, node, &v6->sin6_addr) == 1)
	{
		found->info.ai_family = v6->sin6_family = AF_INET6;
		found->info.ai_addrlen = sizeof(*v6);
	}
	else
	{
		free(found);
		return EAI_NONAME;
	}
	*result = &found->info;
	return 0;
}

void
freeaddrinfo(struct addrinfo *result)
{
	free(result);
}

const char *
gai_strerror(int code)
{
	return "no address";
}

struct hostent *
gethostbyname(const char *name)
{
	return NULL;
}

struct servent *
getservbyname(const char *name, const char *protocol)
{
	return NULL;
}

int
getnameinfo(const struct sockaddr *address, socklen_t len, char *host, socklen_t host_size,
			char *service, socklen_t service_size, int flags)
{
	return EAI_FAIL;
}

int
getservbyport_r(int port, const char *protocol, struct servent *service, char *buffer, size_t size,
				struct servent **result)
{
	*result = NULL;
	return ENOENT;
}

struct passwd *
getpwnam(const char *name)
{
	return NULL;
}

struct passwd *
getpwuid(uid_t uid)
{
	return NULL;
}

struct group *
getgrnam(const char *name)
{
	return NULL;
}

struct group *
getgrgid(gid_t gid)
{
	return NULL;
}

int
initgroups(const char *user, gid_t group)
{
	errno = ENOSYS;
	return -1;
}

iconv_t
iconv_open(const char *to, const char *from)
{
	errno = EINVAL;
	return (iconv_t) -1;
}

size_t
iconv(iconv_t converter, char **in, size_t *in_left, char **out, size_t *out_left)
{
	errno = EBADF;
	return (size_t) -1;
}

int
iconv_close(iconv_t converter)
{
	return 0;
}

void *__wrap_dlopen(const char *file, int mode);

/* libc itself has a use for the real one, which is never reached: see --wrap in the Makefile */
void *
__wrap_dlopen(const char *file, int mode)
{
	return NULL;
}
