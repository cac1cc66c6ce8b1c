/*-------------------------------------------------------------------------
 *
 * clock.c
 *		Lets time pass in a program: preloaded, it adds as many milliseconds to the
 *		clocks that only go forward as the file CLOCK_FILE holds, an int64.
 *
 *-------------------------------------------------------------------------
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *skipped_ms;

__attribute__((constructor)) static void
open_file(void)
{
	int file = open(getenv("CLOCK_FILE"), O_RDONLY | O_CLOEXEC);

	skipped_ms = mmap(NULL, sizeof(*skipped_ms), PROT_READ, MAP_SHARED, file, 0);
	if (skipped_ms == MAP_FAILED)
		abort();
	close(file);
}

int
clock_gettime(clockid_t id, struct timespec *time)
{
	int result = (int) syscall(SYS_clock_gettime, id, time);

	if (skipped_ms != NULL &&
		(id == CLOCK_MONOTONIC || id == CLOCK_MONOTONIC_COARSE || id == CLOCK_BOOTTIME))
	{
		int64_t ns = time->tv_nsec + *skipped_ms % 1000 * 1000000;

		time->tv_sec += *skipped_ms / 1000 + ns / 1000000000;
		time->tv_nsec = ns % 1000000000;
	}
	return result;
}
