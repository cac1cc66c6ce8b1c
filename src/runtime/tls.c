/*-------------------------------------------------------------------------
 *
 * tls.c
 *		Which servers we believe.
 *
 *-------------------------------------------------------------------------
 */
#include "tls.h"

#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "../common/log.h"

/* Where distributions keep the public authorities; this binary runs on any of them. */
static const char *const bundles[] = {
	"/etc/ssl/certs/ca-certificates.crt",
	"/etc/pki/tls/certs/ca-bundle.crt",
	"/etc/ssl/ca-bundle.pem",
	"/etc/ssl/cert.pem",
};

/* In place of the whole verification: the very certificate, or none. */
static int
verify_fingerprint(X509_STORE_CTX *store, void *arg)
{
	const Settings *settings = arg;
	X509 *certificate = X509_STORE_CTX_get0_cert(store);
	uint8_t hash[FINGERPRINT_LEN];

	if (certificate != NULL && X509_digest(certificate, EVP_sha256(), hash, NULL) == 1 &&
		CRYPTO_memcmp(hash, settings->fingerprint, sizeof(hash)) == 0)
	{
		X509_STORE_CTX_set_error(store, X509_V_OK);
		return 1;
	}
	log_line(LOG_LEVEL_WARNING, "certificate has another fingerprint", "host", settings->host,
			 NULL);
	X509_STORE_CTX_set_error(store, X509_V_ERR_CERT_REJECTED);
	return 0;
}

static int
verify_chain(X509_STORE_CTX *store, void *arg)
{
	const Settings *settings = arg;
	int ok = X509_verify_cert(store);

	if (ok != 1)
		log_line(LOG_LEVEL_WARNING, "certificate is refused", "host", settings->host, "reason",
				 X509_verify_cert_error_string(X509_STORE_CTX_get_error(store)), NULL);
	return ok;
}

/* ---- authorities ---- */

/*
 * The authorities of that name in a PEM file, or of any name, into the store.
 * Returns how many there are, or -1 when the file cannot be read to its end.
 */
static int
read_authorities(const char *file, const X509_NAME *name, X509_STORE *store)
{
	BIO *bio = BIO_new_file(file, "r");
	X509 *certificate;
	int count = 0;
	bool at_end;

	if (bio == NULL)
		return -1;
	while ((certificate = PEM_read_bio_X509_AUX(bio, NULL, NULL, NULL)) != NULL)
	{
		if (name == NULL || X509_NAME_cmp(X509_get_subject_name(certificate), name) == 0)
		{
			count++;
			if (store != NULL)
				X509_STORE_add_cert(store, certificate);
		}
		X509_free(certificate);
	}
	at_end = ERR_GET_REASON(ERR_peek_last_error()) == PEM_R_NO_START_LINE;
	BIO_free(bio);
	return at_end ? count : -1;
}

/*
 * OpenSSL lacks an authority: read those of that name.  So the many public ones
 * are never in memory at once.
 */
static int
find_authority(X509_LOOKUP *lookup, X509_LOOKUP_TYPE type, const X509_NAME *name,
			   X509_OBJECT *found)
{
	X509_STORE *store = X509_LOOKUP_get_store(lookup);
	X509_OBJECT *object;

	if (type != X509_LU_X509 ||
		read_authorities(X509_LOOKUP_get_method_data(lookup), name, store) <= 0)
		return 0;
	ERR_clear_error();
	object = X509_OBJECT_retrieve_by_subject(X509_STORE_get0_objects(store), type, name);
	/* it counts a reference that nobody drops: once, since the store has it from now on */
	return object != NULL && X509_OBJECT_set1_X509(found, X509_OBJECT_get0_X509(object));
}

static bool
trust(SSL_CTX *context, const char *file)
{
	X509_LOOKUP_METHOD *method = X509_LOOKUP_meth_new("authorities");
	X509_LOOKUP *lookup;

	if (read_authorities(file, NULL, NULL) <= 0)
		return false;
	X509_LOOKUP_meth_set_get_by_subject(method, find_authority);
	lookup = X509_STORE_add_lookup(SSL_CTX_get_cert_store(context), method);
	return lookup != NULL && X509_LOOKUP_set_method_data(lookup, (void *) file);
}

SSL_CTX *
tls_create(const Settings *settings, const char **problem)
{
	static char text[512];
	SSL_CTX *context = SSL_CTX_new(TLS_client_method());
	X509_VERIFY_PARAM *param = SSL_CTX_get0_param(context);
	const char *file = settings->ca_file;
	size_t i;

	SSL_CTX_set_min_proto_version(context, TLS1_2_VERSION);
	SSL_CTX_set_mode(context, SSL_MODE_RELEASE_BUFFERS);
	SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
	SSL_CTX_set_verify(context, SSL_VERIFY_PEER, NULL);
	if (settings->fingerprint_text != NULL)
	{
		SSL_CTX_set_cert_verify_callback(context, verify_fingerprint, (void *) settings);
		return context;
	}
	SSL_CTX_set_cert_verify_callback(context, verify_chain, (void *) settings);
	/* one context, one host: the name is checked by OpenSSL, which must know whether it is one */
	if (X509_VERIFY_PARAM_set1_ip_asc(param, settings->host) != 1)
	{
		X509_VERIFY_PARAM_set_hostflags(param, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
		X509_VERIFY_PARAM_set1_host(param, settings->host, 0);
	}
	for (i = 0; file == NULL && i < sizeof(bundles) / sizeof(bundles[0]); i++)
	{
		if (access(bundles[i], R_OK) == 0)
			file = bundles[i];
	}
	if (file == NULL || !trust(context, file))
	{
		if (file == NULL)
			snprintf(text, sizeof(text),
					 "no certificate authorities found: set AGENTVM_CA_FILE or "
					 "AGENTVM_FINGERPRINT");
		else
			snprintf(text, sizeof(text), "AGENTVM_CA_FILE=%s: %s", file,
					 ERR_reason_error_string(ERR_peek_last_error()));
		*problem = text;
		SSL_CTX_free(context);
		return NULL;
	}
	ERR_clear_error();
	return context;
}
