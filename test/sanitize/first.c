/*-------------------------------------------------------------------------
 *
 * first.c
 *		Lets AddressSanitizer begin before anything else does.
 *
 * Its runtime sets itself up in the first call of malloc().  In a server that
 * is not built with it, that call comes from the constructor of a library that
 * registers its translations, inside bindtextdomain(), under a lock of the C
 * library.  Setting up looks for optional symbols; what dlerror() says of those
 * that are missing is to be translated, takes that lock again and leaves it in
 * pieces, so that the server's own bindtextdomain() waits for ever.
 *
 * Linked with -z initfirst and preloaded, this constructor runs before all
 * others, when nobody holds the lock.
 *
 * It also takes LD_PRELOAD out of the environment: the programs that this one
 * starts (libvirt and its VMs) are not under test.
 *
 *-------------------------------------------------------------------------
 */
#include <stdlib.h>
#include <string.h>

static void *volatile memory;

__attribute__((constructor)) static void
first(int argc, char **argv, char **envp)
{
	char **to = envp;

	(void) argc;
	(void) argv;
	for (; *envp != NULL; envp++)
	{
		if (strncmp(*envp, "LD_PRELOAD=", 11) != 0)
			*to++ = *envp;
	}
	*to = NULL;
	memory = malloc(1);
	free(memory);
}
