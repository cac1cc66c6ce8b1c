/*-------------------------------------------------------------------------
 *
 * retry.c
 *		How long to wait before the next try.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "engine/retry.h"
#include "port.h"

#define RETRY_BASE_MS 1000

int
retry_delay_ms(int retries, int cap_ms)
{
	int64 delay = RETRY_BASE_MS;
	uint32 random_bits;

	while (--retries > 0 && delay < cap_ms)
		delay *= 2;
	delay = Min(delay, cap_ms);
	if (!pg_strong_random(&random_bits, sizeof(random_bits)))
		random_bits = 0;
	/* between half and one and a half */
	return (int) (delay / 2 + delay * (random_bits % 1024) / 1024);
}
