/*-------------------------------------------------------------------------
 *
 * tls.h
 *		Which servers we believe.
 *
 *-------------------------------------------------------------------------
 */
#ifndef RUNTIME_TLS_H
#define RUNTIME_TLS_H

#include <openssl/types.h>

#include "settings.h"

/*
 * A context for connections to the gateway that these settings name, and to no
 * other host.  Returns NULL, with *problem a static text, when the authorities
 * cannot be read.
 */
extern SSL_CTX *tls_create(const Settings *settings, const char **problem);

#endif /* RUNTIME_TLS_H */
